"""The benchmark of serving: outcomes, goodput, and records that a kill leaves valid, shown as table, page and JSON."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bench.harness import records
from bench.serving import __main__ as command
from bench.serving import vllm
from bench.serving.outcome import Percentiles, Summary
from bench.serving.plot import write_plot
from bench.serving.record import WindowRecord, last_run
from bench.serving.report import BEGIN, END, rows, write_docs
from colm.errors import ConfigError
from tests.serving_windows import BURSTS, LOAD, OBJECTIVE, REFUSED, answered, window


@pytest.mark.parametrize(
    ("changes", "is_met"),
    [
        ({}, True),
        ({"ttft_s": 2.0}, True),  # 1 s and 10 ms for each of 100 tokens
        ({"ttft_s": 2.001}, False),
        ({"ttft_s": 2.0, "num_prompt_tokens": 99}, False),
        ({"tpot_s": 0.1}, True),
        ({"tpot_s": 0.1001}, False),
        ({"num_new_tokens": 1, "tpot_s": None, "longest_gap_s": None}, True),
        ({"outcome": "late", "error": "DeadlineExceeded: over"}, False),
        (REFUSED, False),
    ],
)
def test_the_objective_is_of_both_times_and_of_whole_answers(changes: dict[str, Any], is_met: bool) -> None:
    assert OBJECTIVE.is_met(answered(**changes)) is is_met


@pytest.mark.parametrize(
    "changes",
    [
        {"outcome": "late"},
        {"error": "PeerFailed: why"},
        {"ttft_s": None},
        {"num_new_tokens": 0},
        {"num_new_tokens": 9},
        {"tpot_s": None},
        {"outcome": "lost", "error": "x"},
        {"at_s": -1.0},
        REFUSED | {"num_new_tokens": 1},
    ],
)
def test_what_cannot_have_become_of_a_request_is_no_record(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        answered(**changes)


def test_a_request_without_a_first_token_is_later_than_any_other() -> None:
    """Left out, refusals would make the others' percentiles the better the more of them there are."""
    found = Percentiles.of([0.4, None, 0.1, 0.2])
    assert (found.p50, found.p95, found.p99, found.num) == (0.2, None, None, 4)
    assert Percentiles.of([]) == Percentiles(p50=None, p95=None, p99=None, num=0)


def test_a_summary_counts_every_request_once() -> None:
    requests = [
        answered(),
        answered(ttft_s=5.0),
        answered(**REFUSED),
        answered(num_new_tokens=2, outcome="late", error="DeadlineExceeded: over", queue_s=None),
    ]
    found = Summary.of(requests, OBJECTIVE, 2.0)
    assert found.outcomes == {"finished": 2, "refused": 1, "late": 1, "failed": 0}
    assert (found.num_requests, found.num_met, found.goodput_per_s, found.new_tokens_per_s) == (4, 1, 0.5, 9.0)
    assert (found.ttft_s.num, found.tpot_s.num, found.total_s.num, found.queue_s.num) == (4, 3, 4, 2)
    assert (found.ttft_s.p50, found.ttft_s.p95, found.total_s.p50, found.total_s.p95) == (0.5, None, 0.9, None)


def test_a_record_comes_back_from_its_line_and_has_one_outcome_for_each_arrival(tmp_path: Path) -> None:
    path, whole = tmp_path / "serving.jsonl", window()
    records.append(path, [whole.model_dump(mode="json")])
    assert last_run(path) == [whole]
    with pytest.raises(ValidationError, match="19 requests have an outcome, and 20 arrived"):
        window(requests=whole.requests[1:])
    with pytest.raises(ValidationError, match="the summary is not that of the requests"):
        window(summary=Summary.of([answered(ttft_s=9.0)], OBJECTIVE, 4.0))
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        WindowRecord.model_validate(whole.model_dump(mode="json") | {"speed": 1})


def test_a_torn_line_is_cut_off_and_what_was_over_stays_and_only_the_last_run_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "serving.jsonl"
    for run, system_name in (("1", "disaggregated"), ("2", "disaggregated"), ("2", "one process")):
        records.append(path, [window(run=run, system=system_name).model_dump(mode="json")])
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:100])
    assert [(each.run, each.system) for each in last_run(path)] == [("2", "disaggregated"), ("2", "one process")]
    path.write_bytes(b'{"benchmark": "bench.serving"}\n')
    with pytest.raises(ValueError, match=r"serving\.jsonl:1 is no record of bench\.serving"):
        last_run(path)


def test_rounds_are_one_row_and_rows_are_in_the_order_of_arrivals_rates_and_systems() -> None:
    slow = [answered(ttft_s=3.0)] * LOAD.num_requests
    fast = LOAD.model_copy(update={"rate_per_s": 10.0})
    found = rows(
        [
            window(system="one process"),
            window(load=fast),
            window(load=BURSTS, requests=[answered(**REFUSED)] * BURSTS.num_requests),
            window(),
            window(round=1, requests=slow),
        ]
    )
    assert [(row.pattern, row.rate_per_s, row.system) for row in found] == [
        ("poisson", 5.0, "disaggregated"),
        ("poisson", 5.0, "one process"),
        ("poisson", 10.0, "disaggregated"),
        ("bursts", 5.0, "disaggregated"),
    ]
    first = found[0]
    assert (first.summary.num_requests, first.summary.num_met, first.summary.goodput_per_s) == (40, 20, 2.5)
    assert (first.cpu_s, first.peak_bytes) == (4.0, 100)  # of both rounds, without the client
    assert first.roles["client"] == {"cpu_s": 2.0, "peak_bytes": 50}
    assert "never" in found[3].words()
    assert "0 of 21; 21 refused" in found[3].words()


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.04121, 0.1024], "41.2 / 102 ms"),
        ([0.5, 2.0], "0.500 / 2.00 s"),
        ([0.5, None], "500 ms / never"),
        ([None], "never"),
        ([], "none"),
    ],
)
def test_two_percentiles_are_shown_in_one_unit(values: list[float | None], shown: str) -> None:
    found = rows([window()])[0]
    of_times = found.summary.model_copy(update={"queue_s": Percentiles.of(values)})
    assert replace(found, summary=of_times).words()[7] == shown


def test_the_pages_part_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    page, windows = tmp_path / "serving.md", [window(), window(system="one process")]
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        write_docs(page, rows(windows), windows, "../bench/results/serving.jsonl", "plots/serving.svg")
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n![")
    assert text.endswith(f"{END}\nafter\n")
    assert text.count("| poisson 5/s | one process | 20 of 20 |") == 1
    assert "old" not in text
    for words in (
        "log-normal, median 20, sigma 0.5, clipped to 2 .. 60",
        "30% of the prompts",
        "first token within 1 s",
    ):
        assert words in text
    page.write_text("no place", encoding="utf-8")
    with pytest.raises(ConfigError, match="has no place for the table"):
        write_docs(page, rows(windows), windows, "r", "p")


def test_the_plot_draws_what_was_measured_and_leaves_out_what_never_came(tmp_path: Path) -> None:
    refused = window(load=BURSTS, requests=[answered(**REFUSED)] * BURSTS.num_requests)
    write_plot(tmp_path / "plots" / "serving.svg", rows([window(), refused]), "the source")
    assert (tmp_path / "plots" / "serving.svg").read_bytes().startswith(b"<?xml")


def test_a_window_is_what_vllm_bench_serve_would_have_saved(tmp_path: Path) -> None:
    """Of finished requests alone, by the seconds until the last has ended; goodput of those that met it all."""
    good, slow = answered(ttft_s=0.5, tpot_s=0.05, total_s=0.9), answered(ttft_s=3.5, tpot_s=0.15, total_s=4.9)
    single = answered(num_new_tokens=1, ttft_s=0.5, tpot_s=None, longest_gap_s=None, total_s=0.5)
    requests = [good] * 10 + [slow] * 5 + [single] * 1 + [answered(**REFUSED)] * 4
    vllm.write(
        tmp_path / "new", [window(requests=requests), window(round=1), window(system="one process", load=BURSTS)]
    )
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == [
        "disaggregated-poisson-5qps-m-round0.json",
        "disaggregated-poisson-5qps-m-round1.json",
        "one_process-bursts-5qps-m-round0.json",
    ]
    found = json.loads((tmp_path / "new" / names[0]).read_text())
    assert (found["num_prompts"], found["completed"], found["failed"], found["duration"]) == (20, 16, 4, 5.0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (1600, 121)
    assert (found["request_throughput"], found["request_goodput"]) == (3.2, 2.2)
    assert (found["output_throughput"], found["total_token_throughput"]) == (24.2, 344.2)
    assert found["mean_ttft_ms"] == pytest.approx(1e3 * (11 * 0.5 + 5 * 3.5) / 16)
    assert (found["median_ttft_ms"], found["p99_ttft_ms"]) == (500.0, 3500.0)
    assert found["mean_tpot_ms"] == pytest.approx(1e3 * (10 * 0.05 + 5 * 0.15) / 15)
    assert found["std_tpot_ms"] == pytest.approx(1e3 * math.sqrt(2 / 9) * 0.1)
    assert (found["median_e2el_ms"], found["p95_e2el_ms"]) == (900.0, 4900.0)
    assert (found["request_rate"], found["burstiness"]) == (5.0, 1.0)
    assert (found["date"], found["endpoint_type"], found["label"]) == ("20261125-120000", "disaggregated", None)
    assert json.loads((tmp_path / "new" / names[2]).read_text())["burstiness"] is None


def test_gamma_arrivals_are_named_and_their_shape_is_vllms_burstiness(tmp_path: Path) -> None:
    load = LOAD.model_copy(update={"burstiness": 0.5})
    assert vllm.as_vllm(window(load=load))["burstiness"] == 0.5
    vllm.write(tmp_path, [window(load=load)])
    assert [path.name for path in tmp_path.iterdir()] == ["disaggregated-gamma_0.5-5qps-m-round0.json"]
    (row,) = rows([window(load=load)])
    assert (row.words()[0], row.as_json()["arrivals"]) == ("gamma 0.5 5/s", "gamma 0.5")
    assert BURSTS.model_copy(update={"burstiness": 2.0}).arrivals == "bursts, gamma 2"


def test_requests_at_once_are_counted_second_by_second_as_vllm_counts_them() -> None:
    """Seconds begin with the first arrival, and who was there for a part of one was there: three until 0.9 s after it,
    four from then on."""
    requests = [answered(at_s=0.4)] * 3 + [answered(at_s=1.3)] * 4 + [answered(at_s=1.3, **REFUSED)] * 13
    assert vllm.as_vllm(window(requests=requests))["max_concurrent_requests"] == 7


def test_nothing_that_finished_is_a_time_of_zero_as_vllm_has_it() -> None:
    found = vllm.as_vllm(window(requests=[answered(**REFUSED)] * LOAD.num_requests))
    assert (found["completed"], found["mean_ttft_ms"], found["p99_tpot_ms"]) == (0, 0.0, 0.0)


def test_what_was_measured_is_shown_again_and_what_was_not_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "serving.jsonl"
    monkeypatch.setattr(
        sys, "argv", ["serving", "--show", "--json", "--vllm-json", str(tmp_path), "--record", str(path)]
    )
    with pytest.raises(SystemExit):
        command.main()
    assert "has no run to show; leave out --show to measure one" in capsys.readouterr().err
    records.append(path, [window().model_dump(mode="json")])
    command.main()
    *shown, last = capsys.readouterr().out.splitlines()
    (row,) = json.loads(last)["rows"]
    assert (row["system"], row["rate_per_s"], row["outcomes"]["finished"]) == ("disaggregated", 5.0, 20)
    assert any("poisson 5/s" in line for line in shown)
    assert (tmp_path / "disaggregated-poisson-5qps-m-round0.json").exists()
