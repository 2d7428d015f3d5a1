"""The paper's tables on this machine: samples against the whole, modes by budget, records that a kill leaves valid."""

import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from bench.harness import records
from bench.harness.contest import Measured
from bench.prefill import __main__ as command
from bench.prefill import suite as suite_module
from bench.prefill.case import engine_of_random, prompt
from bench.prefill.estimate import NUM_STRATA, PER_STRATUM, Estimate, choose, estimate, strata
from bench.prefill.layer import KeysValues, SampledLayer, TileSeconds
from bench.prefill.plan import Group, choose_modes, groups
from bench.prefill.record import CellRecord
from bench.prefill.suite import Suite, describe, sample_layers
from bench.roofline.machine import machine
from colm.kv import KvFormat
from colm.model.config import ChainConfig
from tests.clock import FakeClock
from tests.tiny import tiny_config

TINY = tiny_config()
FAMILY = ("llama-3.2-1b", "llama-3.2-1b-16-16-air", "llama-3.2-1b-8-8-8-8-air")


def known(tile: int) -> tuple[float, float]:
    return 512.0, 512.0 * 512 * (tile + 0.5)


@pytest.mark.parametrize("num_tiles", [1, 2, 3, 15, 16, 17, 101, 2048])
def test_strata_are_all_tiles_once_and_each_can_say_how_much_its_tiles_differ(num_tiles: int) -> None:
    found = strata(num_tiles)
    assert [tile for group in found for tile in group] == list(range(num_tiles))
    assert len(found) <= NUM_STRATA
    assert min(map(len, found)) >= min(PER_STRATUM, num_tiles)
    chosen = choose(found, seed=3)
    assert len(set(chosen)) == len(chosen) == sum(min(PER_STRATUM, len(group)) for group in found)


@pytest.mark.parametrize("num_tiles", [1, 2, 4, 17, 2048])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_linear_in_rows_and_pairs_is_found_exactly_from_any_sample(num_tiles: int, seed: int) -> None:
    def cost(tile: int) -> float:
        rows, pairs = known(tile)
        return 3e-5 * rows + 2e-9 * pairs

    groups_ = strata(num_tiles)
    found = estimate(groups_, {tile: cost(tile) for tile in choose(groups_, seed=seed)}, known)
    assert found.total == pytest.approx(sum(map(cost, range(num_tiles))), rel=1e-9)
    assert found.standard_error <= 1e-9 * found.total


def test_the_error_bar_holds_the_sum_of_costs_of_another_shape() -> None:
    """Attention slows down beyond a cache, and every tile varies by some percent by itself."""
    groups_, num_held = strata(512), 0
    for seed in range(200):
        generator = random.Random(seed)
        costs = [
            (1 + 0.01 * tile + (0.004 * (tile - 200) if tile > 200 else 0)) * generator.uniform(0.95, 1.05)
            for tile in range(512)
        ]
        found = estimate(groups_, {tile: costs[tile] for tile in choose(groups_, seed=seed)}, known)
        num_held += abs(found.total - sum(costs)) <= 2 * found.standard_error
        assert found.total == pytest.approx(sum(costs), rel=0.05)
    assert num_held >= 170


def test_all_tiles_of_one_layer_are_summed_and_the_other_layers_leave_an_error_bar() -> None:
    costs = {0: 1.0, 1: 2.5, 2: 2.0, 3: 4.0}
    found = estimate(strata(4), costs, known, num_layers=16)
    assert found.total == pytest.approx(9.5)
    assert found.standard_error > 0
    assert estimate(strata(4), costs, known, num_layers=1).standard_error == 0


@dataclass
class FakeLayer:
    """Costs by formula, on a clock that moves only by them."""

    clock: FakeClock
    row_s: float
    pair_s: float

    def time(self, start: int, stop: int) -> TileSeconds:
        rows = stop - start
        seen = TileSeconds(self.row_s * rows, self.pair_s * (rows * start + rows * (rows + 1) / 2))
        self.clock.now_s += sum(seen)
        return seen


@pytest.mark.parametrize("num_tokens", [100, 1024, 16 * 512, 100_000])
def test_a_sample_says_what_all_layers_take_and_the_last_has_keys_and_values_only(num_tokens: int) -> None:
    config = replace(TINY, num_layers=7)
    layer = FakeLayer(FakeClock(), 1e-4, 1e-8)
    (found,) = sample_layers(
        {"a": config}, {"a": layer.time}, num_tokens=num_tokens, tile_tokens=512, num_repeats=1, seed=0
    ).values()
    pairs = num_tokens * (num_tokens + 1) / 2
    assert found.total == pytest.approx(7 * 1e-4 * num_tokens + 6 * 1e-8 * pairs, rel=1e-9)


def test_presets_take_turns_at_every_tile() -> None:
    order: list[str] = []

    def layer(name: str) -> FakeLayer:
        class Noting(FakeLayer):
            def time(self, start: int, stop: int) -> TileSeconds:
                order.append(name)
                return super().time(start, stop)

        return Noting(FakeClock(), 1.0, 1.0)

    layers = {name: layer(name).time for name in "ab"}
    sample_layers(dict.fromkeys("ab", TINY), layers, num_tokens=64, tile_tokens=16, num_repeats=2, seed=0)
    assert order == ["a", "b"] * (1 + 2 * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [TINY, tiny_config(bias=True, chains=(4,))], ids=["chained", "biases"])
def test_a_sampled_tile_leaves_the_keys_and_values_that_the_engine_computes(
    config: ChainConfig, dtype: torch.dtype
) -> None:
    """The engine's own hidden states through the sampled layer give the engine's own keys and values of layer 0."""
    wanted = replace(config, num_layers=2, vocab_size=1)
    held = KeysValues.random(KvFormat.of(config, dtype), 40, 0)
    layer = SampledLayer(config, dtype, held, tile_tokens=16, seed=0)
    engine = engine_of_random(wanted, dtype, 16, 0)
    layer._source_TD.copy_(engine._model.embedding.embed(torch.zeros(16, dtype=torch.int64), 1))
    for tile in engine.run(prompt(wanted, 40, 0)):
        if tile.layer == 0:
            stop = tile.first_token + tile.num_tokens
            layer.time(tile.first_token, stop)
            assert torch.equal(held.k_KNE[:, tile.first_token : stop], tile.k_KTD)
            assert torch.equal(held.v_KNE[:, tile.first_token : stop], tile.v_KTD)


def test_keys_and_values_of_a_sample_are_written_to_the_last_token() -> None:
    held = KeysValues.random(KvFormat.of(TINY, torch.float32), 10_000, 0)
    assert held.k_KNE.abs().amax(dim=(0, 2)).min() > 0
    assert held.v_KNE.std() == pytest.approx(1, abs=0.05)


def group(num_tokens: int) -> Group:
    return Group(baseline=FAMILY[0], presets=FAMILY, num_tokens=num_tokens)


def test_rows_of_a_family_take_turns_with_their_baseline() -> None:
    found = groups(["llama-3.2-1b-8-8-8-8-air", "llama-3.2-1b-16-16-air", "llama-3.1-8b"], [4096, 2048])
    assert found == [
        group(2048),
        group(4096),
        Group(baseline="llama-3.1-8b", presets=("llama-3.1-8b",), num_tokens=2048),
        Group(baseline="llama-3.1-8b", presets=("llama-3.1-8b",), num_tokens=4096),
    ]
    with pytest.raises(ValueError, match=r"\['llama'\] are not in the paper's prefill tables"):
        groups(["llama"], [2048])


@pytest.mark.parametrize(
    ("budget_s", "modes"),
    [
        (0.5, ["modelled", "modelled", "modelled"]),
        (3.0, ["sampled", "sampled", "modelled"]),
        (7.0, ["sampled", "sampled", "sampled"]),
        (17.0, ["whole", "sampled", "sampled"]),
        (1e6, ["whole", "whole", "sampled"]),
    ],
)
def test_a_budget_buys_samples_first_and_then_whole_runs_from_the_cheapest(
    budget_s: float, modes: list[Measured]
) -> None:
    costs: dict[Group, dict[Measured, float]] = {
        group(1): {"sampled": 1, "whole": 10},
        group(2): {"sampled": 2, "whole": 100},
        group(3): {"sampled": 4},  # no room for the whole
    }
    assert list(choose_modes(costs, budget_s).values()) == modes


class FakeTimer:
    """Each preset in its own time; notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def whole(self, group: Group, num_rounds: int) -> Mapping[str, Sequence[float]]:
        self.asked.append(("whole", group.num_tokens))
        return {name: [8.0 / (1 + place)] * num_rounds for place, name in enumerate(group.presets)}

    def sampled(self, group: Group, num_repeats: int) -> Mapping[str, Estimate]:
        assert num_repeats >= 1
        self.asked.append(("sampled", group.num_tokens))
        return {
            name: Estimate(total=8.25 / (1 + place), standard_error=0.125, num_timed=16, num_tiles=64)
            for place, name in enumerate(group.presets)
        }


def suite(path: Path, *, budget_s: float = 1e9, available_bytes: int = 1 << 40, commit: str = "abc") -> Suite:
    return Suite(
        groups=[group(2048), group(4096)],
        dtype=torch.bfloat16,
        tile_tokens=512,
        num_rounds=3,
        budget_s=budget_s,
        available_bytes=available_bytes,
        machine=machine("cpu"),
        path=path,
        environment={"commit": commit, "cpu": "x", "threads": 2},
    )


def quiet(_: str) -> None:
    pass


def test_every_cell_has_a_record_with_its_mode_its_ratio_and_its_sample(tmp_path: Path) -> None:
    path = tmp_path / "records" / "prefill.jsonl"
    timer = FakeTimer()
    added = suite(path).run(timer, quiet)
    assert timer.asked == [("sampled", 2048), ("whole", 2048), ("sampled", 4096), ("whole", 4096)]
    assert [CellRecord.model_validate(each) for each in records.read(path)] == added
    assert [(each.preset, each.num_tokens) for each in added] == [(name, n) for n in (2048, 4096) for name in FAMILY]
    assert {each.measured for each in added} == {"whole"}
    assert [each.over_baseline.value for each in added[:3]] == [1, 2, 3]
    assert added[0].sample is not None
    assert added[0].sample.seconds.value == 8.25
    assert describe(added[0]).endswith("its sample is +3.1% off")
    assert added[0].reason == ""


def test_a_cell_without_room_is_sampled_and_one_beyond_the_budget_modelled_and_both_say_why(tmp_path: Path) -> None:
    sampled = suite(tmp_path / "a.jsonl", available_bytes=2 << 30).run(FakeTimer(), quiet)
    assert {each.measured for each in sampled} == {"sampled"}
    assert sampled[0].reason.startswith("whole needs ")
    assert (sampled[0].seconds.low, sampled[0].seconds.high) == (8.0, 8.5)
    timer = FakeTimer()
    modelled = suite(tmp_path / "b.jsonl", budget_s=1e-3).run(timer, quiet)
    assert timer.asked == []
    assert {(each.measured, each.reason) for each in modelled} == {("modelled", "the budget of time")}
    assert modelled[0].machine is not None
    assert sampled[0].machine is None


def test_an_interrupted_suite_goes_on_after_the_last_whole_group(tmp_path: Path) -> None:
    path = tmp_path / "prefill.jsonl"
    suite(path).run(FakeTimer(), quiet)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:40])  # killed within the second group
    timer = FakeTimer()
    suite(path).run(timer, quiet)
    assert timer.asked == [("sampled", 4096), ("whole", 4096)]
    assert len(records.read(path)) == 4 + 3
    again = FakeTimer()
    assert suite(path).run(again, quiet) == []
    assert again.asked == []


def test_records_of_another_commit_or_a_model_stand_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "prefill.jsonl"
    suite(path).run(FakeTimer(), quiet)
    other = FakeTimer()
    suite(path, commit="def", budget_s=1e-3).run(other, quiet)
    assert other.asked == []
    assert len(records.read(path)) == 12
    suite(path, commit="def").run(other, quiet)
    assert len(other.asked) == 4


def test_the_command_runs_the_tables_through_the_engine_and_adds_to_its_records(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def main(*words: str) -> list[CellRecord]:
        path = tmp_path / "prefill.jsonl"
        monkeypatch.setattr(sys, "argv", ["bench.prefill", "--budget-minutes", "1", "--output", str(path), *words])
        command.main()
        return [CellRecord.model_validate(each) for each in records.read(path)]

    for module in (command, suite_module):
        monkeypatch.setattr(module, "preset", lambda _: TINY)
    monkeypatch.setattr(command, "calibrate", lambda *_, **__: machine("cpu"))
    words = ["--preset", FAMILY[2], "--tile-tokens", "16", "--rounds", "2"]
    first = main(*words, "--lengths", "64,96")
    assert [(each.preset, each.num_tokens) for each in first] == [(name, n) for n in (64, 96) for name in FAMILY[::2]]
    assert {(each.measured, each.num_rounds, each.sample is None) for each in first} == {("whole", 2, False)}
    assert main(*words, "--lengths", "64,96,40")[:4] == first
    assert len(main(*words, "--lengths", "64,96,40")) == 6


def test_a_torn_line_is_not_read_and_gives_way_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    records.append(path, [{"a": 1}])
    path.write_bytes(path.read_bytes() + b'{"b"')
    assert records.read(path) == [{"a": 1}]
    records.append(path, [{"c": 3}])
    assert records.read(path) == [{"a": 1}, {"c": 3}]
    path.write_text("{}\nno\n")
    with pytest.raises(ValueError, match=r"r\.jsonl:2 is not JSON"):
        records.read(path)


def test_a_record_with_a_field_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    added = suite(tmp_path / "p.jsonl").run(FakeTimer(), quiet)
    with pytest.raises(ValidationError, match="speed"):
        CellRecord.model_validate(json.loads(added[0].model_dump_json()) | {"speed": 1})
