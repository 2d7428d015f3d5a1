"""The prefill benchmark: what it has room for, what it refuses to time, where the time goes, and its record."""

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from colm_kernels.few_rows_linear import MAX_ROWS

from bench.harness.suite import Options, arguments, run
from bench.kernels.common import short
from bench.prefill import __main__ as command
from bench.prefill.case import PrefillCase, ProfileCase, check_engine, engine_of_random, prompt
from bench.prefill.memory import Prefill, choose, weights_bytes, working_bytes
from bench.prefill.parts import PARTS, parts_timed
from bench.random_weights import RandomWeights
from colm.checkpoint import prefill_tensor_names
from colm.dtypes import fastest_dtype
from colm.model import parameter_shapes
from colm.model.config import ChainConfig
from colm.placement import CPU
from prefill_node.engine import PrefillEngine
from tests.tiny import tiny_config

MIB = 1 << 20
TINY = tiny_config()
WIDE = tiny_config(dim=8 * 64, hidden_dim=1024, num_layers=2, max_context=1 << 20)
BF16 = torch.bfloat16
PREFILLS = [
    Prefill(model=model, config=config, num_tokens=num_tokens)
    for num_tokens in (40, 64)
    for model, config in {"tiny": TINY, "llama": tiny_config(chains=(4,))}.items()
]


def entry_of(case: PrefillCase, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    run([case], arguments("bench.prefill", None).parse_args(["--rounds", "2", "--json"], namespace=Options()))
    (entry,) = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]
    return entry  # type: ignore[no-any-return]


@pytest.fixture
def small_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.prefill.case.GEMM_SHAPES", ((64, 64, 64), (32, 64, 128)))


@pytest.mark.usefixtures("small_gemms")
def test_every_model_and_length_is_rated_beside_the_gemm_of_its_own_turn(capsys: pytest.CaptureFixture[str]) -> None:
    entry = entry_of(PrefillCase(prefills=PREFILLS, dtype=torch.float32, tile_tokens=16), capsys)
    assert entry["name"] == "prefill_fp32_t16"
    assert entry["shape"]["tiny"] == {
        "model": "tiny",
        "dim": 64,
        "hidden_dim": 96,
        "head_dim": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "num_layers": 2,
        "vocab_size": 320,
    }
    units = ("s", "tokens_per_s", "gflops_per_s", "gemm_gflops_per_s", "gemm_fraction")
    names = ("tiny_40", "llama_40", "tiny_64", "llama_64")
    assert list(entry["metrics"]) == [f"{name}_{unit}" for name in names for unit in units]


@pytest.mark.usefixtures("small_gemms")
def test_the_fraction_is_the_prefills_rate_over_the_best_gemms() -> None:
    case = PrefillCase(prefills=PREFILLS[:1], dtype=torch.float32, tile_tokens=16)
    rates = iter([10.0, 30.0, 20.0, 50.0])  # two shapes before the prefill, the same two after it

    def gemm() -> dict[str, float]:
        return {"gflops_per_s": next(rates)}

    seen = case.turn(PREFILLS[0], lambda: None, [gemm, gemm])()
    assert seen["gemm_gflops_per_s"] == 40
    assert seen["gemm_fraction"] == seen["gflops_per_s"] / 40


@pytest.mark.usefixtures("small_gemms")
def test_a_profile_has_a_share_for_each_part_and_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = entry_of(ProfileCase(prefills=PREFILLS[:1], dtype=BF16, tile_tokens=16), capsys)["metrics"]
    assert set(metrics) == {"tiny_40_s", "tiny_40_rest_fraction", *(f"tiny_40_{part}_fraction" for part in PARTS)}


@pytest.mark.parametrize("overrides", [{}, {"num_layers": 1}, {"activation": "gelu", "num_layers": 3}])
def test_each_operation_of_the_engine_is_timed_once_under_its_part(overrides: dict[str, int]) -> None:
    """A clock that moves on by one whenever it is read counts calls: a part inside another is not seen."""
    config = tiny_config(**overrides)
    # Fewer rows than these run in one call of the library, which has no parts.
    tile_tokens = MAX_ROWS + 1
    engine = engine_of_random(config, torch.float32, tile_tokens, 0)
    with parts_timed(clock=itertools.count().__next__) as calls:
        list(engine.run(prompt(config, 3 * tile_tokens, 0)))
    whole, all_layers = 3 * (config.num_layers - 1), 3 * config.num_layers
    assert calls == {
        "norms": all_layers + whole,
        "qkv": all_layers + whole,
        "rotation": 2 * all_layers + whole,
        "attention": whole,
        "ffn": whole,
        "output": whole,
    }


def test_nothing_is_timed_when_a_profile_is_over() -> None:
    engine = engine_of_random(TINY, torch.float32, 16, 0)
    with parts_timed(clock=itertools.count().__next__) as calls:
        pass
    list(engine.run(prompt(TINY, 40, 0)))
    assert set(calls.values()) == {0}


@pytest.mark.parametrize("config", [TINY, tiny_config(bias=True), WIDE], ids=["tiny", "biases", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_engine_as_it_is_passes_the_check(config: ChainConfig, dtype: torch.dtype) -> None:
    check_engine(config, dtype, 16, 0)


@pytest.mark.parametrize("changed", ["0.ffn.down.chain1", "0.attention_norm.chain1", "1.attention.wk.chain1"])
def test_an_engine_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    def wrong(
        config: ChainConfig, dtype: torch.dtype, tile_tokens: int, seed: int, device: torch.device
    ) -> PrefillEngine:
        engine = engine_of_random(config, dtype, tile_tokens, seed, device)
        engine._model.get_parameter(f"layers.{changed}").mul_(1.2)
        return engine

    monkeypatch.setattr("bench.prefill.case.engine_of_random", wrong)
    case = PrefillCase(prefills=PREFILLS[:1], dtype=torch.float32, tile_tokens=16)
    with case.contest(0) as contest, pytest.raises(AssertionError, match="are over their budget"):
        contest.check()


def fitting(available_bytes: int, *lengths: int, models: dict[str, ChainConfig] | None = None) -> list[str]:
    runs, skipped = choose(
        models or {"a": TINY, "b": TINY}, lengths, dtype=BF16, tile_tokens=16, available_bytes=available_bytes
    )
    assert len(runs) + len(skipped) == len(lengths) * len(models or "ab")
    return [each.name for each in runs]


def test_a_length_runs_where_its_bytes_fit_beside_all_weights() -> None:
    weights = weights_bytes(TINY, BF16)
    working = {n: working_bytes(TINY, BF16, num_tokens=n, tile_tokens=16) for n in (100, 500)}
    assert fitting(2 * weights + working[500], 100, 500) == ["a_100", "b_100", "a_500", "b_500"]
    assert fitting(2 * weights + working[500] - 1, 100, 500) == ["a_100", "b_100"]
    assert fitting(2 * weights + working[100] - 1, 100, 500) == []


def test_a_model_whose_weights_do_not_fit_leaves_the_others_their_room() -> None:
    huge = replace(TINY, vocab_size=1 << 24)
    assert fitting(100 * MIB, 100, models={"a": TINY, "huge": huge, "b": TINY}) == ["a_100", "b_100"]


def test_what_does_not_run_says_why() -> None:
    models = {"tiny": TINY, "huge": replace(TINY, vocab_size=1 << 24)}
    runs, skipped = choose(models, [512, 1024], dtype=BF16, tile_tokens=16, available_bytes=100 * MIB)
    assert [each.name for each in runs] == ["tiny_512"]
    assert [(each.model, each.num_tokens) for each in skipped] == [("huge", 512), ("tiny", 1024), ("huge", 1024)]
    assert skipped[0].reason.startswith("needs 2.1 GiB, weights of 2 models among them; 100.0 MiB are available")
    assert skipped[1].reason == "its context is 512"


def test_random_weights_depend_on_name_and_seed_alone() -> None:
    def weights(seed: int) -> RandomWeights:
        return RandomWeights(config=TINY, dtype=BF16, seed=seed)

    names = sorted(prefill_tensor_names(TINY))
    all_of_it, again = weights(0).tensors(names), weights(0).tensors(names[3:4])
    assert {name: tensor.shape for name, tensor in all_of_it.items()} == {
        name: shape for name, shape in parameter_shapes(TINY).items() if name in names
    }
    assert torch.equal(again[names[3]], all_of_it[names[3]])
    assert not torch.equal(weights(1).tensors(names[3:4])[names[3]], all_of_it[names[3]])


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command over a tiny model that bears a preset's name."""
    monkeypatch.setattr(
        command, "preset", {"tiny": TINY, "CoLM": tiny_config(kv_sharing=False, num_kv_heads=4)}.__getitem__
    )

    def run_with(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["bench.prefill", *words])
        command.main()

    return run_with


@pytest.mark.usefixtures("small_gemms")
def test_the_command_ends_with_a_record_of_what_ran_and_what_did_not(
    main: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    main("--preset", "tiny", "--lengths", "32,2K", "--tile-tokens", "16", "--rounds", "1", "--json")
    out, err = capsys.readouterr()
    record = json.loads(out.splitlines()[-1])
    assert [case["name"] for case in record["cases"]] == [f"prefill_{short(fastest_dtype(CPU))}_t16"]
    assert record["skipped"] == [{"model": "tiny", "num_tokens": 2048, "reason": "its context is 512"}]
    assert record["cases"][0]["metrics"]["tiny_32_tokens_per_s"]["n"] == 1
    assert err == "skipping tiny at 2K: its context is 512\n"


def test_where_nothing_fits_there_is_a_record_all_the_same(
    main: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    main("--preset", "tiny", "--lengths", "1M", "--json")
    record = json.loads(capsys.readouterr().out)
    assert (record["cases"], len(record["skipped"])) == ([], 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "tiny", "--lengths", "2K,8k"], "length '8k' is not one; write e.g. 2K, 1M or 1000"),
        (["--preset", "CoLM"], "cannot be served"),
        ([], "one of --budget-minutes and --preset is required"),
        (["--budget-minutes", "0"], "0 is not above 0"),
        (["--budget-minutes", "1", "--preset", "tiny"], "are not in the paper's prefill tables"),
        (["--budget-minutes", "1", "--profile"], "--profile goes with --preset alone"),
    ],
)
def test_what_cannot_run_is_refused_with_the_way_out(
    main: Callable[..., None], capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit):
        main(*words)
    assert said in " ".join(capsys.readouterr().err.split())
