"""`make load-client`: what guidellm is told, and what of its report is held against the cluster."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from bench.load_client import CHAT, COMPLETIONS, Step, ask, parser, scenario, step, wrong
from cluster.scrape import NOTHING, Scrape, Window
from cluster.state import ClusterState
from colm.errors import ColmError

STATE = ClusterState(
    gateway_address="127.0.0.1:1", http_address="127.0.0.1:2", ray_address="", ray_pid=None, client_token="secret",
    ca_file=None,
)  # fmt: skip


def options(*words: str) -> Namespace:
    return parser().parse_args(["--requests", "2", "--prompt-tokens", "10", "--output-tokens", "4", *words])


def seen(path: str = COMPLETIONS, **fields: Any) -> Step:
    found: dict[str, Any] = {
        "path": path, "streams": 1, "finished": 2, "failed": 0, "prompt_tokens": (10, 10), "new_tokens": (4, 4),
        "ttft_ms": 1.0, "tpot_ms": 1.0, "output_tokens_per_s": 1.0, "error": "",
    }  # fmt: skip
    return Step(**found | fields)


def counted(prompt_tokens: int = 20, new_tokens: int = 8) -> Window:
    """What the gateway counted."""
    counts = {"colm_prompt_tokens_total": prompt_tokens, "colm_new_tokens_total": new_tokens}
    return Window(NOTHING, Scrape(1.0, {(name, frozenset()): float(count) for name, count in counts.items()}))


def test_counts_that_agree_are_no_problem_and_a_chat_may_have_its_template() -> None:
    assert wrong([seen()], options(), counted()) == []
    assert wrong([seen(CHAT, prompt_tokens=(40, 40))], options(), counted(prompt_tokens=80)) == []


@pytest.mark.parametrize(
    ("of_step", "of_gateway", "problem"),
    [
        ({"finished": 1, "failed": 1, "error": "400 Bad Request"}, {}, "1 of 2 finished: 400 Bad Request"),
        ({"finished": 1}, {}, "1 of 2 finished: no error"),
        ({"new_tokens": (4, 3)}, {"new_tokens": 7}, "answers of [3, 4] tokens, not 4"),
        ({"prompt_tokens": (10, 11)}, {"prompt_tokens": 21}, "texts of [10, 11] tokens, not 10"),
        ({}, {"prompt_tokens": 19}, "colm_prompt_tokens_total grew by 19.0, and guidellm counts 20"),
        ({}, {"new_tokens": 9}, "colm_new_tokens_total grew by 9.0, and guidellm counts 8"),
    ],
)
def test_what_fails_or_is_counted_otherwise_is_said(
    of_step: dict[str, Any], of_gateway: dict[str, int], problem: str
) -> None:
    (said,) = wrong([seen(**of_step)], options(), counted(**of_gateway))
    assert problem in said


def test_a_benchmark_of_the_report_is_a_step() -> None:
    found = step(
        CHAT,
        {
            "config": {"strategy": {"streams": 4}},
            "metrics": {
                "request_totals": {"successful": 1, "errored": 1, "incomplete": 1, "total": 3},
                "time_to_first_token_ms": {"successful": {"median": 5.0}},
                "time_per_output_token_ms": {"successful": {"median": 6.0}},
                "output_tokens_per_second": {"successful": {"mean": 7.0}},
            },
            "requests": {
                "successful": [{"prompt_tokens": 30, "output_tokens": 4}],
                "errored": [{"info": {"error": "400"}}],
                "incomplete": [{"info": {"error": None}}],
            },
        },
    )
    assert (found.streams, found.finished, found.failed, found.error) == (4, 1, 2, "400")
    assert (found.prompt_tokens, found.new_tokens) == ((30,), (4,))
    assert (found.ttft_ms, found.tpot_ms, found.output_tokens_per_s) == (5.0, 6.0, 7.0)


def test_the_token_is_in_a_file_that_others_cannot_read_and_not_among_the_arguments(tmp_path: Path) -> None:
    program = tmp_path / "guidellm"
    program.write_text(
        f'#!/bin/sh\nstat -c %a "$3" >{tmp_path}/mode\ncp "$3" {tmp_path}/plan\necho "$@" >{tmp_path}/said'
    )
    program.chmod(0o700)
    chosen = options("--guidellm", str(program), "--streams", "1", "3")
    with pytest.raises(ColmError, match="guidellm ended with 0"):  # and without a report
        ask(STATE, CHAT, chosen.streams, chosen)
    plan = json.loads((tmp_path / "plan").read_text())
    assert (tmp_path / "mode").read_text() == "600\n"
    assert "secret" not in (tmp_path / "said").read_text()
    report = Path(plan["spec"]["outputs"][0]["path"])
    assert plan == scenario(STATE, CHAT, chosen.streams, chosen, report)
    assert plan["spec"]["backend"]["api_key"] == "secret"
    assert [each["profile.streams"] for each in plan["benchmarks"]] == [1, 3]


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    chosen = options("--guidellm", str(tmp_path / "guidellm"))
    with pytest.raises(ColmError, match="make load-client"):
        ask(STATE, CHAT, [1], chosen)
