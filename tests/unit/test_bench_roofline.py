"""The model of other machines: its arithmetic by hand, its errors against the paper, and its page."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import paper
from bench.roofline import calibrate, sizing
from bench.roofline.__main__ import PAGES
from bench.roofline.fit import FITTED, LONG_TOKENS, Prediction, fit, mean_error, predictions
from bench.roofline.machine import FOLDER, Machine, Work, machine
from bench.roofline.model import Prompt, first_step_s, layer_steps, prefill_s, streamed_s
from colm.checkpoint import prefill_tensor_names
from colm.flops import prefill_flops
from colm.kv import KvFormat
from colm.model.config import ChainConfig
from colm.model.presets import preset
from colm.model.transformer import num_parameters
from tests.tiny import tiny_checkpoint, tiny_config

TINY = tiny_config()
PREFILL_RECORD = Path(sizing.__file__).parents[1] / "results" / "prefill.jsonl"
GPU = Machine(
    name="gpu",
    gemm_gflops_per_s=4.0,
    attention_gflops_per_s=2.0,
    memory_gb_per_s=1.0,
    step_s=1e-9,
    overlaps_host=True,
)
CPU = replace(GPU, overlaps_host=False)


def prompt(num_tokens: int = 40, tile_tokens: int | None = 16, config: ChainConfig = TINY, **more: bool) -> Prompt:
    return Prompt(config=config, num_tokens=num_tokens, tile_tokens=tile_tokens, **more)


@pytest.mark.parametrize("tile_tokens", [1, 16, 40, None])
def test_the_operations_of_all_tiles_are_those_of_the_prefill(tile_tokens: int | None) -> None:
    tiles = list(prompt(tile_tokens=tile_tokens).tiles())
    assert sum(tile.num_tokens for tile in tiles) == 40
    first = sum(tile.keys_values.linear_flops for tile in tiles)
    rest = sum(tile.rest.linear_flops + tile.rest.attention_flops for tile in tiles)
    assert TINY.num_layers * first + (TINY.num_layers - 1) * rest == prefill_flops(TINY, 40)


def test_work_takes_each_rate_in_turn_and_few_rows_wait_for_the_weights() -> None:
    assert GPU.seconds(Work(linear_flops=8e9, attention_flops=2e9, weight_bytes=1e9, moved_bytes=1e9)) == 2 + 1 + 1
    assert GPU.seconds(Work(linear_flops=8e9, weight_bytes=3e9)) == 3


def test_a_gpus_host_runs_beside_it_and_a_cpu_does_both() -> None:
    slow = {"step_s": 2.0}
    assert replace(GPU, **slow).step_seconds(0.5) == 2
    assert replace(GPU, **slow).step_seconds(3.0) == 3
    assert replace(CPU, **slow).step_seconds(0.5) == 2.5


def test_a_prefill_is_the_sum_of_its_steps_and_its_last_layer_ends_with_keys_and_values() -> None:
    steps = layer_steps(GPU, prompt(), is_whole=True)
    cut = layer_steps(GPU, prompt(), is_whole=False)
    layer_s = sum(step.before_s + step.after_s for step in steps)
    assert [step.after_s for step in cut] == [0, 0, 0]
    assert prefill_s(GPU, prompt()) == pytest.approx(layer_s + sum(step.before_s for step in cut))
    assert prefill_s(GPU, prompt(is_last_layer_whole=True)) == pytest.approx(2 * layer_s)


@pytest.mark.parametrize("target", [GPU, CPU])
def test_a_stream_lies_between_the_longer_of_the_two_and_their_sum(target: Machine) -> None:
    computed_s, num_bytes = prefill_s(target, prompt()), 40 * 2 * 2 * 2 * 16 * 2  # layers, k and v, heads, dim, bf16
    for stream_s in (1e-9, computed_s / 3, computed_s, 3 * computed_s):
        took_s = streamed_s(target, prompt(), num_bytes / stream_s)
        assert max(computed_s, stream_s) <= took_s * (1 + 1e-9)
        assert took_s <= (computed_s + stream_s) * (1 + 1e-9)
    assert streamed_s(target, prompt(), 1e30) == pytest.approx(computed_s)


def test_a_smaller_window_never_makes_a_stream_faster_and_an_empty_one_takes_turns() -> None:
    num_bytes_per_s = 40 * 256 / prefill_s(GPU, prompt())
    times = [streamed_s(GPU, prompt(), num_bytes_per_s, window_bytes) for window_bytes in (1 << 30, 4096, 2048, 0)]
    assert times == sorted(times)
    assert times[0] < times[-1]


def test_the_first_step_reads_every_weight_and_the_cache() -> None:
    num_weights = num_parameters(TINY) - TINY.vocab_size * TINY.dim  # an embedding is looked up
    num_bytes = 2 * num_weights + 40 * 2 * 2 * 2 * 16 * 2
    assert first_step_s(GPU, TINY, 40) == pytest.approx(num_bytes / 1e9)


def error(chosen: list[Prediction], *, is_fitted: bool) -> float:
    return mean_error(each for each in chosen if each.is_fitted == is_fitted)


def test_the_papers_long_cells_are_predicted_within_six_percent_though_only_the_baselines_were_fitted() -> None:
    predicted = predictions(machine("a100-paper"))
    suspect = {cell.key for cell in paper.load().cells.values() if cell.suspect}
    assert len(predicted) == 140 - 2
    assert not suspect & {each.cell.key for each in predicted}
    long = [each for each in predicted if each.cell.num_tokens >= LONG_TOKENS]
    assert sum(each.is_fitted for each in predicted) == 20
    assert mean_error(long) < 0.06
    assert error(long, is_fitted=False) < 0.06


def test_the_machine_file_has_what_the_fit_finds() -> None:
    stored = machine("a100-paper")
    fitted = fit(stored)
    assert [getattr(stored, name) for name in FITTED] == [getattr(fitted, name) for name in FITTED]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_pages_are_what_the_command_writes(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == PAGES[path]()


def test_the_cpus_file_says_what_its_processor_has_been_measured_to_take() -> None:
    """It said half of that: it had been measured beside other work, with slower products. Dense prefills, 15% each."""
    of_cpu = machine("cpu")
    cells = [
        cell
        for cell in map(json.loads, PREFILL_RECORD.read_text(encoding="utf-8").splitlines())
        if "family {cpu_family}, model {cpu_model}), {threads} threads".format(**cell["environment"]) in of_cpu.name
        and (cell.get("attention"), cell["dtype"]) == ("dense", "bf16")
        and cell["measured"] != "modelled"
    ]
    assert len(cells) > 20, (
        f"{PREFILL_RECORD} and cpu.toml are of different processors: calibrate on that of the record"
    )
    ratios = [
        prefill_s(of_cpu, prompt(cell["num_tokens"], cell["tile_tokens"], preset(cell["preset"])))
        / cell["seconds"]["value"]
        for cell in cells
    ]
    assert min(ratios) > 0.85
    assert max(ratios) < 1.15


@pytest.mark.parametrize(("decode_step_s", "wanted_s"), [(None, 4.0), (0.5, 1.5)])
def test_a_decode_step_has_a_host_of_its_own_where_all_layers_run_in_one_call(
    decode_step_s: float | None, wanted_s: float
) -> None:
    target = replace(CPU, step_s=3.0, decode_step_s=decode_step_s)
    assert target.decode_layer_seconds(1.0) == wanted_s
    assert target.step_seconds(1.0) == 4.0


def test_a_calibration_says_that_others_used_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes on all cores, each thread has half of its core. The clocks are the test's."""
    monkeypatch.setattr(calibrate, "ROUNDS", 1)
    monkeypatch.setattr(calibrate, "preset", lambda _: TINY)
    monkeypatch.setattr(calibrate, "NARROW", TINY)
    monkeypatch.setattr(calibrate, "_attention", lambda *_: lambda: 1.0)
    monkeypatch.setattr(calibrate, "read_ceiling", lambda: lambda: {"gb_per_s": 10.0})
    for share, is_told in ((1.0, False), (0.5, True)):
        moments = iter((0.0, share * torch.get_num_threads()))
        monkeypatch.setattr(calibrate, "_processor_s", lambda moments=moments: next(moments))
        told = list[str]()
        measured = calibrate.calibrate(torch.float32, with_stream=False, tell=told.append)
        assert [f"{share:.0%}" in each for each in told] == [True] * is_told
        assert f"threads that had {share:.0%} of their cores" in measured.sources["memory_gb_per_s"]
        assert measured.memory_gb_per_s == 10.0


def test_a_cluster_is_sized_by_what_its_nodes_take() -> None:
    """The first model's numbers by hand: 16 layers of 8 kv heads of 64, keys and values, two bytes each."""
    names = ("llama-3.2-1b", "llama-3.2-1b-16-16-air", "llama-3.2-1b-8-8-8-8-air")
    assert {KvFormat.of(preset(name), torch.bfloat16).token_bytes for name in names} == {16 * 8 * 64 * 2 * 2}
    row = next(
        line
        for line in sizing.page_table().splitlines()
        if line.startswith("| llama-3.2-1b, in chains or not | bfloat16")
    )
    num_pages = (4 << 30) // (64 * 32768)
    assert "| 32.0 KiB | 2.0 MiB |" in row
    assert f"{num_pages:,} pages, {num_pages * 64:,} tokens" in row
    assert row.endswith(f"| {num_pages // (8192 // 64 + 4)} | {num_pages // (131072 // 64 + 4)} |")


def test_a_prefill_replica_is_said_to_hold_what_it_loads(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    loaded = checkpoint.tensors(prefill_tensor_names(checkpoint.config))
    wanted = sum(tensor.numel() for tensor in loaded.values()) * 2
    assert sizing.prefill_weight_bytes(checkpoint.config) == wanted


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_machine_file_says_where_its_numbers_come_from(path: Path) -> None:
    loaded = Machine.load(path)
    assert all(len(source) > 10 for source in loaded.sources.values())


def test_a_machine_comes_back_from_its_file(tmp_path: Path) -> None:
    stored = replace(machine("h100"), stream_gb_per_s=1.25, name='a "quoted" name')
    stored = replace(stored, sources={**stored.sources, "stream_gb_per_s": "measured"})
    (tmp_path / "m.toml").write_text(stored.dump())
    assert Machine.load(tmp_path / "m.toml") == stored


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("[step_s]", "[steps_s]"), r"\['step_s'\] are missing"),
        (("overlaps_host = true", "overlaps_host = 1"), "overlaps_host true or false"),
        (("value = 3350.0", "value = -1.0"), "memory_gb_per_s=-1.0 must be above 0"),
        (('source = "NVIDIA H100 data sheet, SXM"', ""), r"\[memory_gb_per_s\] must have value and source"),
        (("overlaps_host", "[cache]\nvalue = 1\n[x]\noverlaps_host"), "are unknown|are missing"),
    ],
)
def test_a_wrong_machine_file_is_refused_by_the_field(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    (tmp_path / "m.toml").write_text(machine("h100").dump().replace(*change))
    with pytest.raises(ValueError, match=said):
        Machine.load(tmp_path / "m.toml")
