"""Windows of the serving benchmark as a record has them, made up."""

from typing import Any

from bench.serving.outcome import Answered, Objective, Summary
from bench.serving.record import WindowRecord
from bench.serving.trace import Load, LogNormal

LENGTHS = LogNormal(median=20, sigma=0.5, low=2, high=60)
LOAD = Load(
    pattern="poisson",
    rate_per_s=5,
    seconds=4,
    burst_size=3,
    documents=LENGTHS,
    answers=LogNormal(median=4, sigma=0.5, low=1, high=8),
    shared_fraction=0.3,
    num_prefixes=2,
    prefix_tokens=8,
)
OBJECTIVE = Objective(first_s=1, first_s_per_token=0.01, token_s=0.1)
BURSTS = LOAD.model_copy(update={"pattern": "bursts"})


def answered(**changes: Any) -> Answered:
    values = {
        "at_s": 0.0, "sent_late_s": 0.0, "num_prompt_tokens": 100, "prefix": None, "max_new_tokens": 8,
        "num_new_tokens": 8, "outcome": "finished", "error": "", "ttft_s": 0.5, "tpot_s": 0.05, "longest_gap_s": 0.06,
        "total_s": 0.9, "queue_s": 0.1,
    }  # fmt: skip
    return Answered(**(values | changes))


REFUSED: dict[str, Any] = {
    "num_new_tokens": 0, "outcome": "refused", "error": "CapacityExceeded: full", "ttft_s": None, "tpot_s": None,
    "longest_gap_s": None, "queue_s": None,
}  # fmt: skip


def window(**changes: Any) -> WindowRecord:
    load = changes.pop("load", LOAD)
    requests = changes.pop("requests", [answered(at_s=float(each % 4)) for each in range(load.num_requests)])
    values = {
        "environment": {"commit": "0123456789", "cpu": "CPU", "threads": 2, "command": "c", "date": "today"},
        "run": "2026-11-25T12:00:00+00:00", "system": "disaggregated", "model": "m", "dtype": "bfloat16", "round": 0,
        "seed": 0, "timeout_s": 60.0, "load": load, "objective": OBJECTIVE, "busy_s": 5.0, "requests": requests,
        "usage": {
            "decode": {"cpu_s": 2.0, "peak_bytes": 100, "num_processes": 1},
            "client": {"cpu_s": 1.0, "peak_bytes": 50, "num_processes": 1},
        },
        "summary": Summary.of(requests, OBJECTIVE, load.seconds),
    }  # fmt: skip
    return WindowRecord(**(values | changes))
