"""The harness checks first, lets contenders take turns, and records what they report."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.harness.contest import Case, Contest, Measured, Run, Spread, measure, timed
from bench.harness.environment import in_fresh_process, peak_memory_bytes, processor
from bench.harness.percentile import percentile
from bench.harness.suite import Options, arguments, run
from bench.harness.units import length, parse_length, show, show_shape, unit_of

MIB = 1 << 20


class Turns:
    """Contenders that note their turns and report one scripted value a turn."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def check(self) -> None:
        self.log.append("check")

    def run(self, name: str, metric: str, values: Sequence[float]) -> Run:
        left = iter(values)

        def take_a_turn() -> Mapping[str, float]:
            self.log.append(name)
            return {metric: next(left)}

        return take_a_turn


@dataclass(frozen=True, kw_only=True)
class ScriptedCase(Case):
    num_tokens: int
    make: Callable[[int], Contest]

    @property
    def name(self) -> str:
        return f"scripted_t{self.num_tokens}"

    @property
    def shape(self) -> dict[str, object]:
        return {"num_tokens": self.num_tokens}

    @property
    def measured(self) -> Measured:
        return "sampled"

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        yield self.make(seed)


def options(*words: str) -> Options:
    return arguments("bench.scripted", "doc").parse_args(words, namespace=Options())


def scripted(seed: int = 0) -> Contest:
    del seed
    turns = Turns()
    runs = {"ours": turns.run("ours", "s", [99, 1, 2, 4]), "theirs": turns.run("theirs", "s", [99, 4, 4, 4])}
    return Contest(check=turns.check, contenders=runs, ours="ours", against=["theirs"], facts={"density": 0.25})


def wrong(seed: int = 0) -> Contest:
    del seed

    def check() -> None:
        raise AssertionError("1.0 is not 2.0")

    return Contest(check=check, contenders={"ours": lambda: pytest.fail("timed although it is wrong")})


def test_contenders_are_checked_then_take_turns_round_after_round() -> None:
    turns = Turns()
    runs = {name: turns.run(name, "s", [9, 1, 2]) for name in ("a", "b", "c")}
    after = []
    measure(Contest(check=turns.check, contenders=runs), 2, lambda: after.append(turns.log[-1]))
    assert turns.log == ["check", *"abc", *"abc", *"abc"]
    assert after == turns.log[1:]


def test_the_round_that_warms_up_does_not_count() -> None:
    assert measure(scripted(), 3).seen["ours"]["s"] == Spread(median=2, min=1, max=4, n=3)


@pytest.mark.parametrize(
    ("metric", "expected"), [("s", [4.0, 2.0, 1.0]), ("gb_per_s", [0.25, 0.5, 1.0]), ("peak_bytes", [4.0, 2.0, 1.0])]
)
def test_ratios_compare_turns_of_one_round_and_are_above_one_where_ours_is_better(
    metric: str, expected: list[float]
) -> None:
    turns = Turns()
    runs = {"ours": turns.run("ours", metric, [99, 1, 2, 4]), "theirs": turns.run("theirs", metric, [99, 4, 4, 4])}
    contest = Contest(check=turns.check, contenders=runs, ours="ours", against=["theirs"], compared_by=metric)
    assert measure(contest, 3).ratios == {"theirs": Spread.of(expected)}


def test_a_ratio_with_who_does_not_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\['theirs'\] are compared but do not run; contenders: \['ours'\]"):
        Contest(check=lambda: None, contenders={"ours": lambda: {"s": 1}}, ours="ours", against=["theirs"])


def test_a_wrong_result_ends_the_run_before_anything_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.json"
    with pytest.raises(AssertionError, match=r"1\.0 is not 2\.0"):
        run([ScriptedCase(num_tokens=1, make=wrong)], options("--json", "--output", str(record)))
    assert capsys.readouterr().out == ""
    assert not record.exists()


def test_a_turn_is_timed_per_call_and_divides_work_by_time() -> None:
    calls: list[int] = []
    turn = timed(lambda: calls.append(1), num_calls=4, clock=iter([10.0, 12.0]).__next__, gb=3.0)
    assert turn() == {"s": 0.5, "gb_per_s": 6.0}
    assert calls == [1]


def test_the_record_is_the_last_line_and_says_what_a_reader_needs(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [ScriptedCase(num_tokens=tokens, make=scripted) for tokens in (2048, 5)]
    run(cases, options("--json", "--rounds", "3", "--seed", "7"), variants=["avx2"])
    *table, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert set(record) == {
        *("command", "commit", "dirty", "versions", "seed", "rounds", "threads"),
        *("cpu", "cpu_vendor", "cpu_family", "cpu_model", "cpu_features"),
        *("variants", "peak_memory_bytes", "cases"),
    }
    assert record["command"].startswith("python -m bench.scripted")
    assert (record["seed"], record["rounds"], record["variants"]) == (7, 3, ["avx2"])
    assert record["peak_memory_bytes"] > MIB
    assert [case["name"] for case in record["cases"]] == ["scripted_t2048", "scripted_t5"]
    assert record["cases"][0] == {
        "name": "scripted_t2048",
        "measured": "sampled",
        "shape": {"num_tokens": 2048},
        "ours": "ours",
        "metrics": {
            "ours_s": {"median": 2, "min": 1, "max": 4, "n": 3},
            "theirs_s": {"median": 4, "min": 4, "max": 4, "n": 3},
            "over_theirs_x": {"median": 2.0, "min": 1.0, "max": 4.0, "n": 3},
            "density": 0.25,
        },
    }
    text = "\n".join(table)
    assert "scripted_t2048: measured sampled, median (min .. max) of 3" in text
    assert "2.00 s (1.00 .. 4.00)" in text
    assert "4.00 s  " in text
    assert "2.00x (1.00x .. 4.00x)" in text
    assert "num_tokens 2K; density 0.250" in text


def test_a_wide_table_cuts_off_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = [f"part{letter}_fraction" for letter in "abcdefghij"]
    names = [f"a-model-with-quite-a-long-name_{count}K" for count in (2, 8)]
    turns = iter(range(1, 7))

    def turn() -> Mapping[str, float]:
        return dict.fromkeys(metrics, next(turns) / 7)

    contest = Contest(check=lambda: None, contenders=dict.fromkeys(names, turn))
    run([ScriptedCase(num_tokens=1, make=lambda _: contest)], options("--rounds", "2"))
    out = capsys.readouterr().out
    assert all(name in out for name in names)
    assert "…" not in out


def test_a_record_is_written_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, lines = tmp_path / "results" / "whole.json", tmp_path / "results" / "lines.jsonl"
    for _ in range(2):
        for path in (whole, lines):
            run([ScriptedCase(num_tokens=1, make=scripted)], options("--rounds", "3", "--output", str(path)))
    assert json.loads(whole.read_text())["cases"][0]["name"] == "scripted_t1"
    assert [json.loads(line)["cases"][0]["name"] for line in lines.read_text().splitlines()] == ["scripted_t1"] * 2
    assert '"command"' not in capsys.readouterr().out


def test_the_seed_reaches_the_cases() -> None:
    seeds = []

    def make(seed: int) -> Contest:
        seeds.append(seed)
        return scripted()

    run([ScriptedCase(num_tokens=1, make=make)], options("--rounds", "1", "--seed", "11"))
    assert seeds == [11]


@pytest.mark.parametrize(
    ("num_values", "percent", "place"),
    [
        (1, 95, 1),
        (1, 1, 1),
        (16, 95, 16),
        (20, 95, 19),
        (100, 95, 95),
        (3, 50, 2),
        (4, 50, 2),
        (100, 7, 7),
        (9, 100, 9),
    ],
)
def test_so_many_in_100_values_are_not_above_a_percentile(num_values: int, percent: int, place: int) -> None:
    assert percentile(list(map(float, reversed(range(1, num_values + 1)))), percent) == place


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], 0), ([1.0], 101)])
def test_what_has_no_percentile_is_refused(values: list[float], percent: int) -> None:
    with pytest.raises(ValueError, match=f"percent={percent} of {len(values)} values"):
        percentile(values, percent)


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--threads", "-1"]])
def test_counts_below_one_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(*words)
    assert "is below 1" in capsys.readouterr().err


@pytest.mark.parametrize("metric", ["ours_gflop_per_s", "mapped_ms", "resident_mib", "mb_per_s", "speed", ""])
def test_one_spelling_for_each_unit(metric: str) -> None:
    with pytest.raises(ValueError, match="ends in no known unit; use one of s, bytes, gflops_per_s"):
        unit_of(metric)
    turns: list[int] = []

    def turn() -> Mapping[str, float]:
        turns.append(1)
        return {metric: 1.0}

    with pytest.raises(ValueError, match="ends in no known unit"):
        measure(Contest(check=lambda: None, contenders={"ours": turn}), 5)
    assert turns == [1], "the mistake is known after the first turn, not after the last"
    with pytest.raises(ValueError, match="ends in no known unit"):
        Contest(check=lambda: None, contenders={}, facts={metric: 1.0})


@pytest.mark.parametrize(
    ("metric", "value", "shown"),
    [
        ("read_s", 1234.5, "1,234 s"),
        ("s", 2.5, "2.50 s"),
        ("s", 0.0123, "12.3 ms"),
        ("s", 45.6e-6, "45.6 µs"),
        ("s", 7e-9, "7.00 ns"),
        ("s", 0.0, "0 ns"),
        ("resident_bytes", 3 << 29, "1.5 GiB"),
        ("avx512_bf16_gflops_per_s", 287.4, "287 GFLOP/s"),
        ("ours_tls_gb_per_s", 0.3381, "0.338 GB/s"),
        ("prefill_tokens_per_s", 299.5, "300 tokens/s"),
        ("over_sdpa_x", 3.1, "3.10x"),
        ("density", 0.25, "0.250"),
        ("gemm_fraction", 0.8125, "0.812"),
    ],
)
def test_each_unit_is_shown_one_way(metric: str, value: float, shown: str) -> None:
    assert show(metric, value) == shown


def test_shapes_are_shown_as_people_say_them() -> None:
    shape = {
        "num_keys": 8192,
        "dense": {"num_queries": 1 << 20, "context_len": 1000},
        "message_bytes": 4 << 20,
        "dim": 64,
    }
    assert show_shape("", shape) == "num_keys 8K, num_queries 1M, context_len 1,000, message_bytes 4.0 MiB, dim 64"


@pytest.mark.parametrize(
    ("text", "count"), [("2K", 2048), ("1M", 1 << 20), ("96K", 96 << 10), ("1", 1), ("1000", 1000), ("512", 512)]
)
def test_lengths_are_read_as_people_say_them(text: str, count: int) -> None:
    assert parse_length(text) == count


@given(st.integers(1, 1 << 12), st.sampled_from([1 << 10, 1 << 20]))
def test_lengths_are_read_as_they_are_shown(number: int, unit: int) -> None:
    assert parse_length(length(number * unit)) == number * unit


@pytest.mark.parametrize("text", ["", "0", "0K", "-2K", "2k", "2KiB", "2.5K", "K", " 2K", "1G"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not one; write e\.g\. 2K, 1M or 1000"):
        parse_length(text)


def test_a_processor_is_known_by_family_model_and_features() -> None:
    text = (
        "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
        "flags\t\t: fpu sse2 fma avx avx512_bf16\n\nprocessor\t: 1\nmodel\t\t: 99\n"
    )
    assert processor(text) == {
        "cpu": "AMD EPYC",
        "cpu_vendor": "AuthenticAMD",
        "cpu_family": 25,
        "cpu_model": 17,
        "cpu_features": ["fma", "avx", "avx512_bf16"],
    }


def test_a_processor_that_says_little_is_recorded_as_unknown() -> None:
    said = processor("processor\t: 0\nBogoMIPS\t: 50\n")
    assert said == {"cpu": "unknown", "cpu_vendor": None, "cpu_family": None, "cpu_model": None, "cpu_features": []}


def test_a_child_peak_is_its_own_and_not_its_parents() -> None:
    """getrusage's peak of a child begins with the parent's, whose memory it shares until it runs its own program."""
    ballast = bytearray(b"\1") * (768 * MIB)
    assert in_fresh_process(peak_memory_bytes) < len(ballast) <= peak_memory_bytes()
