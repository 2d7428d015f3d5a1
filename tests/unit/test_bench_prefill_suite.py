"""The paper's tables on this machine: samples against the whole, modes by budget, records that a kill leaves valid."""

import json
import random
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from bench.harness import records
from bench.harness.contest import Measured
from bench.prefill import __main__ as command
from bench.prefill import cost, record, timer
from bench.prefill import suite as suite_module
from bench.prefill.case import engine_of_random, prompt
from bench.prefill.cost import Costs
from bench.prefill.estimate import NUM_STRATA, PER_STRATUM, Estimate, choose, estimate, strata
from bench.prefill.layer import KeysValues, SampledLayer, TileSeconds
from bench.prefill.plan import Group, Row, choose_modes, groups
from bench.prefill.record import CellRecord, PeerRecord
from bench.prefill.sampling import LayerSample, share_timed, take_turns
from bench.prefill.sparse import Budget
from bench.prefill.suite import Suite, describe, minutes
from bench.prefill.timer import PeerTimed, Seen, Timed
from bench.report.compare import newest
from bench.roofline.machine import machine
from colm.kv import KvFormat
from colm.model.config import ChainConfig
from colm.model.presets import preset
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
    wanted = num_tiles if num_tiles <= NUM_STRATA * PER_STRATUM else PER_STRATUM * len(found)
    assert len(set(chosen)) == len(chosen) == wanted


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

    plan_s: float = 0.0

    def plan(self) -> float:
        self.clock.now_s += self.plan_s
        return self.plan_s

    def time(self, start: int, stop: int) -> TileSeconds:
        rows = stop - start
        seen = TileSeconds(self.row_s * rows, self.pair_s * (rows * start + rows * (rows + 1) / 2))
        self.clock.now_s += sum(seen)
        return seen


@pytest.mark.parametrize("num_tokens", [100, 1024, 16 * 512, 100_000])
def test_a_sample_says_what_all_layers_take_and_the_last_has_keys_and_values_only(num_tokens: int) -> None:
    sample = LayerSample(FakeLayer(FakeClock(), 1e-4, 1e-8, 0.5), num_tokens=num_tokens, tile_tokens=512, seed=0)
    take_turns([sample])
    found = sample.estimate(7)
    pairs = num_tokens * (num_tokens + 1) / 2
    assert found.total == pytest.approx(7 * 1e-4 * num_tokens + 6 * (1e-8 * pairs + 0.5), rel=1e-9)
    assert found.num_timed == pytest.approx(share_timed(num_tokens, 512) * found.num_tiles, abs=0.9)


@dataclass
class NotingLayer(FakeLayer):
    """Says in which order tiles came."""

    name: str = ""
    order: list[tuple[str, int]] = field(default_factory=list)

    def time(self, start: int, stop: int) -> TileSeconds:
        self.order.append((self.name, start // 16))
        return super().time(start, stop)


def order_of(num_tokens: int) -> list[tuple[str, int]]:
    order: list[tuple[str, int]] = []
    layers = [NotingLayer(FakeClock(), 1.0, 1.0, name=name, order=order) for name in "ab"]
    take_turns([LayerSample(layer, num_tokens=num_tokens, tile_tokens=16, seed=0) for layer in layers])
    return order


def test_a_short_prompts_layers_run_from_the_first_tile_to_the_last_as_in_the_engine() -> None:
    """Tiles that came one by one, other models between them, found the weights in memory, not in the caches."""
    assert order_of(64) == [(name, tile) for name in "ab" for tile in (0, *range(4))]


def test_long_prompts_layers_take_turns_at_every_tile_behind_their_own_first() -> None:
    order = order_of(16 * 100)[2:]
    assert len(order) == 2 * 2 * NUM_STRATA * PER_STRATUM
    for turn in range(0, len(order), 4):
        (tile,) = {tile for _, tile in order[turn + 1 : turn + 4 : 2]}
        assert order[turn : turn + 4] == [("a", 0), ("a", tile), ("b", 0), ("b", tile)]


def test_what_a_busy_machine_takes_from_some_turns_is_in_the_sample_as_it_is_in_the_whole() -> None:
    layer = FakeLayer(FakeClock(), 1.0, 0.0)
    sample = LayerSample(layer, num_tokens=64, tile_tokens=16, seed=0)
    for row_s in (1.0, 1.0, 4.0):
        layer.row_s = row_s
        sample.take_all()
    assert sample.estimate(3).total == pytest.approx(2.0 * 64 * 3)


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


@pytest.mark.usefixtures("one_thread")
def test_a_sampled_sparse_tile_leaves_the_hidden_states_that_the_engine_computes() -> None:
    """The second pass of a sparse layer: its queries, what its plan lists, and the feed-forward."""
    config = tiny_config(max_context=2048, num_layers=2, vocab_size=1)
    budget, dtype, num_tokens = Budget(512), torch.float32, 1024
    held = KeysValues.random(KvFormat.of(config, dtype), num_tokens, 0)
    engine = engine_of_random(config, dtype, 128, 0)
    plans = partial(budget.plans, config)
    layer = SampledLayer(config, dtype, held, tile_tokens=128, seed=0, plans=plans)
    layer._source_TD.copy_(engine._model.embedding.embed(torch.zeros(128, dtype=torch.int64), 1))
    run = engine.begin(prompt(config, num_tokens, 0), sparse=budget.plans(config))
    while run.layer == 0 and not run.is_second_pass:
        engine.step([run])
    held.k_KNE.copy_(run.k_KNE)
    held.v_KNE.copy_(run.v_KNE)
    assert layer.plan() > 0
    while run.layer == 0 or run.due is not None:
        engine.step([run])
    assert layer._plan is not None
    assert layer._plan.density() < 0.9
    for start in range(0, num_tokens, 128):
        layer.time(start, start + 128)
        assert torch.equal(layer._x_TD, run.hidden_ND[start : start + 128])


def test_keys_and_values_of_a_sample_are_written_to_the_last_token() -> None:
    held = KeysValues.random(KvFormat.of(TINY, torch.float32), 10_000, 0)
    assert held.k_KNE.abs().amax(dim=(0, 2)).min() > 0
    assert held.v_KNE.std() == pytest.approx(1, abs=0.05)


def group(num_tokens: int, *peers: str) -> Group:
    return Group(rows=tuple(Row(name, "dense") for name in FAMILY), num_tokens=num_tokens, peers=peers)


def test_rows_of_a_family_take_turns_with_their_baseline() -> None:
    found = groups(["llama-3.2-1b-8-8-8-8-air", "llama-3.2-1b-16-16-air", "llama-3.1-8b"], [4096, 2048])
    assert found == [
        group(2048),
        Group(rows=(Row("llama-3.1-8b", "dense"),), num_tokens=2048),
        group(4096),
        Group(rows=(Row("llama-3.1-8b", "dense"),), num_tokens=4096),
    ]
    with pytest.raises(ValueError, match=r"\['llama'\] are not in the paper's prefill tables"):
        groups(["llama"], [2048])


def test_sparse_rows_stand_where_the_paper_has_them_and_peers_where_they_are_asked_for() -> None:
    name = FAMILY[2]
    found = groups([name], [2048, 128 << 10], peers=["p"], peers_baseline=FAMILY[0], peer_lengths=[512, 2048])
    dense = (Row(FAMILY[0], "dense"), Row(name, "dense"))
    assert found == [
        Group(rows=dense, num_tokens=512, peers=("p",), is_for_peers=True),
        Group(rows=dense, num_tokens=2048, peers=("p",)),
        Group(rows=(*dense, Row(name, "sparse")), num_tokens=128 << 10),
    ]


@pytest.mark.parametrize(
    ("budget_s", "modes"),
    [
        (0.5, ["modelled", "modelled", "modelled", "modelled"]),
        (3.0, ["sampled", "sampled", "modelled", "modelled"]),
        (7.0, ["sampled", "sampled", "sampled", "modelled"]),
        (18.0, ["whole", "sampled", "sampled", "modelled"]),
        (38.0, ["whole", "sampled", "sampled", "whole"]),
        (1e6, ["whole", "whole", "sampled", "whole"]),
    ],
)
def test_a_budget_buys_samples_first_and_then_whole_runs_from_the_cheapest(
    budget_s: float, modes: list[Measured]
) -> None:
    costs: dict[Group, dict[Measured, float]] = {
        group(1): {"sampled": 1, "whole": 11},
        group(2): {"sampled": 2, "whole": 102},
        group(3): {"sampled": 4},  # no room for the whole
        group(4): {"whole": 20},  # nothing to sample: only beside peers
    }
    assert list(choose_modes(costs, budget_s).values()) == modes


def test_short_lengths_are_sampled_before_cheaper_long_ones() -> None:
    """An 8B model at 4K costs more than a 1B one at 64K: every configuration has its short lengths first."""
    costs: dict[Group, dict[Measured, float]] = {group(1): {"sampled": 5}, group(2): {"sampled": 2}}
    assert list(choose_modes(costs, 6.0).values()) == ["sampled", "modelled"]


def test_peers_have_their_whole_runs_before_cheaper_ones_of_ours_alone() -> None:
    costs: dict[Group, dict[Measured, float]] = {
        group(1): {"sampled": 1, "whole": 5},
        group(2, "p"): {"sampled": 1, "whole": 7},
    }
    assert list(choose_modes(costs, 9.0).values()) == ["sampled", "whole"]


@dataclass
class FakeTimer:
    """Each preset in its own time; notes what it was asked for, and lets a clock run."""

    clock: FakeClock = field(default_factory=FakeClock)
    took_s: Callable[[Group], float] = lambda _: 0.0
    asked: list[tuple[str, int]] = field(default_factory=list)
    kept: list[tuple[set[str], bool]] = field(default_factory=list)

    def keep(self, presets: Collection[str], *, with_peers: bool) -> None:
        self.kept.append((set(presets), with_peers))

    def measure(self, group: Group, *, is_whole: bool, num_rounds: int) -> Seen:
        assert num_rounds >= 1
        self.asked.append(("whole" if is_whole else "sampled", group.num_tokens))
        self.clock.now_s += self.took_s(group)
        rows = {
            row: Timed(
                sample=Estimate(total=8.25 / (1 + place), standard_error=0.125, num_timed=16, num_tiles=64),
                whole_s=[8.0 / (1 + place)] * num_rounds if is_whole else (),
            )
            for place, row in enumerate(group.rows)
        }
        peers = {"p": PeerTimed(version="1", seconds=[16.0] * num_rounds), "q": PeerTimed(absent="not installed")}
        return Seen(rows=rows, peers={name: peers[name] for name in group.peers} if is_whole else {})


def costs(available_bytes: int = 1 << 40) -> Costs:
    return Costs(
        machine=machine("cpu"),
        dtype=torch.bfloat16,
        tile_tokens=512,
        num_rounds=3,
        available_bytes=available_bytes,
        budget=Budget(),
    )


def suite(
    path: Path,
    *,
    of: Sequence[Group] = (group(2048), group(4096)),
    budget_s: float = 1e9,
    available_bytes: int = 1 << 40,
    commit: str = "abc",
    clock: FakeClock | None = None,
) -> Suite:
    return Suite(
        groups=of,
        costs=costs(available_bytes),
        budget_s=budget_s,
        path=path,
        environment={"commit": commit, "cpu": "x", "threads": 2},
        clock=lambda: clock.now_s if clock is not None else 0.0,
    )


def quiet(_: str) -> None:
    pass


def cells_of(path: Path) -> list[CellRecord]:
    return record.cells(record.read(path))


def test_every_cell_has_a_record_with_its_mode_its_ratio_and_how_far_its_sample_is_off(tmp_path: Path) -> None:
    path = tmp_path / "records" / "prefill.jsonl"
    timer = FakeTimer()
    added = suite(path).run(timer, quiet)
    assert timer.asked == [("whole", 2048), ("whole", 4096)]
    assert record.read(path) == added
    cells = record.cells(added)
    assert [(each.preset, each.num_tokens) for each in cells] == [(name, n) for n in (2048, 4096) for name in FAMILY]
    assert {each.measured for each in cells} == {"whole"}
    assert [each.over_baseline.value for each in cells[:3]] == [1, 2, 3]
    assert cells[0].sample is not None
    assert (cells[0].sample.off, cells[0].sample.agrees) == (0.03125, True)
    assert describe(cells[0]).endswith("its sample is +3.1% off")
    assert cells[0].reason == ""


def test_a_sample_that_is_more_than_a_twentieth_off_the_whole_says_so() -> None:
    found = Estimate(total=8.5, standard_error=0.1, num_timed=4, num_tiles=4)
    assert record.Sample.of(found, 8.0).agrees is False
    assert record.Sample.of(found, 9.0).agrees is False
    assert record.Sample.of(found, 8.4).agrees is True
    assert record.Sample.of(found, None).agrees is None


def test_peers_have_records_beside_the_rows_and_absent_ones_say_why(tmp_path: Path) -> None:
    path = tmp_path / "prefill.jsonl"
    timer = FakeTimer()
    added = suite(path, of=[group(2048, "p", "q"), group(4096)]).run(timer, quiet)
    present, absent = (each for each in added if isinstance(each, PeerRecord))
    assert (present.version, present.reason) == ("1", "")
    assert {name: bar.value for name, bar in present.speedups.items()} == dict(zip(FAMILY, (2, 4, 6), strict=True))
    assert (absent.seconds, absent.reason, absent.speedups) == (None, "not installed", {})
    assert describe(absent) == "q 2K: absent: not installed"
    assert record.read(path) == added
    assert timer.kept == [(set(FAMILY), True), (set(FAMILY), False)]


def test_sparse_rows_state_their_budget_and_are_run_anew_with_another(tmp_path: Path) -> None:
    path = tmp_path / "prefill.jsonl"
    rows = (Row(FAMILY[0], "dense"), Row(FAMILY[0], "sparse"))
    of = [Group(rows=rows, num_tokens=128 << 10)]
    dense, sparse = record.cells(suite(path, of=of).run(FakeTimer(), quiet))
    assert dense.sparse is None
    assert sparse.sparse is not None
    assert sparse.sparse.keys_per_row == 4096
    assert sparse.over_baseline.value == 2
    assert suite(path, of=of).run(FakeTimer(), quiet) == []
    other = suite(path, of=of)
    assert len(replace(other, costs=replace(other.costs, budget=Budget(2048))).run(FakeTimer(), quiet)) == 2


def test_a_cell_without_room_is_sampled_and_one_beyond_the_budget_modelled_and_both_say_why(tmp_path: Path) -> None:
    sampled = record.cells(suite(tmp_path / "a.jsonl", available_bytes=2 << 30).run(FakeTimer(), quiet))
    assert {each.measured for each in sampled} == {"sampled"}
    assert sampled[0].reason.startswith("whole needs ")
    assert (sampled[0].seconds.low, sampled[0].seconds.high) == (8.0, 8.5)
    timer = FakeTimer()
    modelled = record.cells(suite(tmp_path / "b.jsonl", budget_s=1e-3).run(timer, quiet))
    assert timer.asked == []
    assert {(each.measured, each.reason) for each in modelled} == {("modelled", "the budget of time")}
    assert modelled[0].machine is not None
    assert sampled[0].machine is None


def test_a_group_that_takes_longer_than_predicted_leaves_less_for_those_behind_it(tmp_path: Path) -> None:
    of = [group(length) for length in (2048, 4096, 8192)]
    predicted_s = [costs().of(each)[0]["whole"] for each in of]
    clock = FakeClock()
    timer = FakeTimer(clock, took_s=lambda _: predicted_s[0] + 0.9 * sum(predicted_s))
    told: list[str] = []
    added = suite(tmp_path / "p.jsonl", of=of, budget_s=1.1 * sum(predicted_s), clock=clock).run(timer, told.append)
    assert timer.asked[0] == ("whole", 2048)
    assert [mode for mode, _ in timer.asked[1:]] in ([], ["sampled"], ["sampled", "sampled"])
    assert len(added) == 9
    assert "left, " in told[1]


def test_time_that_is_left_when_all_is_sampled_goes_into_whole_runs(tmp_path: Path) -> None:
    """Predictions were too long, or a later run brings a budget of its own."""
    of, path = [group(2048), group(4096)], tmp_path / "p.jsonl"
    sampled_s = {each: costs().of(each)[0]["sampled"] for each in of}
    clock = FakeClock()
    timer = FakeTimer(clock, took_s=lambda group: sampled_s[group])
    suite(path, of=of, budget_s=1.01 * sum(sampled_s.values()), clock=clock).run(timer, quiet)
    assert timer.asked == [("sampled", 2048), ("sampled", 4096)]
    again = FakeTimer()
    suite(path, of=of).run(again, quiet)
    assert again.asked == [("whole", 2048), ("whole", 4096)]
    assert {each.measured for each in newest(record.read(path)).cells} == {"whole"}
    last = FakeTimer()
    assert suite(path, of=of).run(last, quiet) == []


def test_an_interrupted_suite_goes_on_after_the_last_whole_group(tmp_path: Path) -> None:
    path = tmp_path / "prefill.jsonl"
    suite(path).run(FakeTimer(), quiet)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:40])  # killed within the second group
    timer = FakeTimer()
    suite(path).run(timer, quiet)
    assert timer.asked == [("whole", 4096)]
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
    assert len(other.asked) == 2


def test_rows_of_the_same_layers_share_a_sample() -> None:
    names = ("llama-3.2-1b-8-8-8-8-air", "llama-3.2-1b-8-24-air-same-params", "llama-3.2-1b-16-16-air")
    assert len({cost.layer_of(preset(name)) for name in names}) == 2


def test_minutes_are_told_as_people_read_them() -> None:
    assert [minutes(each) for each in (0.4, 99, 260)] == ["0 s", "99 s", "4 min 20 s"]


def test_the_command_runs_the_tables_through_the_engine_and_adds_to_its_records(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def main(*words: str) -> list[CellRecord]:
        path = tmp_path / "prefill.jsonl"
        monkeypatch.setattr(sys, "argv", ["bench.prefill", "--budget-minutes", "1", "--output", str(path), *words])
        command.main()
        return cells_of(path)

    for module in (command, cost, suite_module, timer):
        monkeypatch.setattr(module, "preset", lambda _: TINY)
    monkeypatch.setattr(command, "calibrate", lambda *_, **__: machine("cpu"))
    words = ["--preset", FAMILY[2], "--tile-tokens", "16", "--rounds", "2", "--peers"]
    first = main(*words, "--lengths", "64,96")
    assert [(each.preset, each.num_tokens) for each in first] == [(name, n) for n in (64, 96) for name in FAMILY[::2]]
    assert {(each.measured, each.num_rounds, each.sample is None) for each in first} == {("whole", 2, False)}
    assert main(*words, "--lengths", "64,96,40")[:4] == first
    assert len(main(*words, "--lengths", "64,96,40")) == 6


@pytest.fixture
def own_signals() -> Iterator[None]:
    """A command that was interrupted hears nothing further, which the tests after it should."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals")
def test_an_interrupted_command_says_where_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Suite, "run", interrupted)
    monkeypatch.setattr(command, "calibrate", lambda *_, **__: machine("cpu"))
    words = ["--budget-minutes", "1", "--lengths", "2K", "--output", str(tmp_path / "p.jsonl")]
    monkeypatch.setattr(sys, "argv", ["bench.prefill", *words])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 130
    assert "p.jsonl has every group that was done; the same command goes on after them" in capsys.readouterr().err


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
