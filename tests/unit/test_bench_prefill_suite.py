"""The paper's tables on this machine: records of every cell, which a kill leaves valid."""

import json
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from bench.harness import records
from bench.prefill import __main__ as command
from bench.prefill import cost, record, timer
from bench.prefill import suite as suite_module
from bench.prefill.cost import Costs
from bench.prefill.estimate import Estimate
from bench.prefill.plan import Group, Row
from bench.prefill.record import CellRecord, PeerRecord
from bench.prefill.sparse import Budget
from bench.prefill.suite import Suite, describe, minutes
from bench.prefill.timer import PeerTimed, Seen, Timed
from bench.report.compare import newest
from bench.roofline.machine import machine
from colm.model.presets import preset
from tests.clock import FakeClock
from tests.suite_groups import FAMILY, TINY, group


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
