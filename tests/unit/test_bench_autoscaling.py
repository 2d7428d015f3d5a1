"""The benchmark of autoscaling: when its prompts come, what it reads off the trace, and its plot."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest

from bench.autoscaling import PHASES, SCALING, Seen, Trace, prompts
from bench.autoscaling_plot import write_plot
from bench.serving.outcome import Answered


def seen(at_s: float, num_wanted: int, num_present: int, queued_s: float = 0.0) -> Seen:
    return Seen(at_s=at_s, num_wanted=num_wanted, num_present=num_present, demand=1.0, queued_s=queued_s)


LOOKS = [
    seen(0.0, 1, 1),
    seen(14.0, 2, 1),
    seen(20.0, 2, 1, 6.0),
    seen(30.0, 2, 2, 9.0),
    seen(61.0, 2, 2),
    seen(80.0, 1, 2),
    seen(92.0, 1, 1),
]


def answered(outcome: str = "finished") -> Answered:
    is_whole = outcome == "finished"
    return Answered.model_validate(
        {
            "at_s": 1.0,
            "sent_late_s": 0.0,
            "num_prompt_tokens": 8,
            "prefix": None,
            "max_new_tokens": 1,
            "num_new_tokens": int(is_whole),
            "outcome": outcome,
            "error": "" if is_whole else "lost",
            "ttft_s": 2.5 if is_whole else None,
            "tpot_s": None,
            "longest_gap_s": None,
            "total_s": 3.0,
            "queue_s": None,
        }
    )


def trace(looks: Sequence[Seen] = LOOKS, *outcomes: str) -> Trace:
    return Trace(prompt_s=1.0, seen=looks, answered=[answered(each) for each in outcomes or ("finished",)])


def test_prompts_come_at_even_times_and_differ() -> None:
    asked = list(prompts(1.5, 8, 100, 0))
    assert len({tuple(each.token_ids_N) for each in asked}) == len(asked)
    began_s = 0.0
    for seconds, load in PHASES:
        times = [each.at_s for each in asked if began_s <= each.at_s < began_s + seconds]
        assert times[0] == began_s
        assert all(later - earlier == pytest.approx(1.5 / load) for earlier, later in pairwise(times))
        began_s += seconds


def test_times_count_from_the_step_and_from_its_end() -> None:
    metrics = trace().metrics()
    assert (metrics["step_to_wanted_s"], metrics["step_to_present_s"]) == (5.0, 15.0)
    assert (metrics["fall_to_wanted_s"], metrics["fall_to_present_s"]) == (20.0, 32.0)
    assert (metrics["longest_queue_s"], metrics["num_changes"], metrics["num_failed"]) == (9.0, 2, 0)


def test_what_never_came_and_who_failed_are_told() -> None:
    metrics = trace(LOOKS[:5], "finished", "failed").metrics()
    assert metrics["fall_to_wanted_s"] is None
    assert (metrics["num_requests"], metrics["num_failed"]) == (2, 1)
    assert trace(LOOKS, "failed").metrics()["longest_first_token_s"] == 0.0


def test_the_plot_is_drawn_of_the_record_alone(tmp_path: Path) -> None:
    record = {
        "model": "m",
        "cpu": "c",
        "prompt_tokens": 8,
        "phases": PHASES,
        "scaling": SCALING,
        "seen": [asdict(each) for each in LOOKS],
    }
    write_plot(tmp_path / "plots" / "it.svg", record)
    assert (tmp_path / "plots" / "it.svg").read_bytes().startswith(b"<?xml")
