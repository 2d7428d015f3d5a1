"""Windows in the JSON of `vllm bench serve --save-result`, for whatever reads that.

Names and definitions are vLLM's (vllm/benchmarks/serve.py at def9ce8): times are of finished requests alone, in
milliseconds, and rates are by the seconds until the last request had ended. Times count from when a request was due,
here as everywhere in this benchmark; vLLM's count from when it was sent.

Two of its fields need the time of each token, which a record does not keep: `itl`, of which the record has each
request's longest alone, and `max_output_tokens_per_s`.
"""

import json
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.serving.outcome import Answered
from bench.serving.record import WindowRecord

PERCENTILES: Final = (50, 95, 99)


def as_vllm(window: WindowRecord) -> dict[str, Any]:
    """One window."""
    finished = [each for each in window.requests if each.outcome == "finished"]
    num_input = sum(each.num_prompt_tokens for each in finished)
    num_output = sum(each.num_new_tokens for each in finished)
    num_good = sum(map(window.objective.is_met, window.requests))
    return {
        "date": datetime.fromisoformat(window.run).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": window.system,
        "backend": window.system,
        "label": None,
        "model_id": window.model,
        "tokenizer_id": window.model,
        "num_prompts": len(window.requests),
        "request_rate": window.load.rate_per_s,
        # Of the times between requests; where several arrive at once, these have no gamma distribution.
        "burstiness": window.load.burstiness if window.load.num_together == 1 else None,
        "max_concurrency": None,
        "duration": window.busy_s,
        "completed": len(finished),
        "failed": len(window.requests) - len(finished),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(finished) / window.busy_s,
        "request_goodput": num_good / window.busy_s,
        "output_throughput": num_output / window.busy_s,
        "total_token_throughput": (num_input + num_output) / window.busy_s,
        "max_concurrent_requests": _most_at_once(finished),
        **_times("ttft", [each.ttft_s for each in finished]),
        **_times("tpot", [each.tpot_s for each in finished]),
        **_times("e2el", [each.total_s for each in finished]),
    }


def _most_at_once(finished: Sequence[Answered]) -> int:
    """How many were there in one second, for however short a part of it, counted from the first arrival."""
    began_s = min((each.at_s for each in finished), default=0.0)
    seconds = Counter[int]()
    for each in finished:
        first_s = each.at_s - began_s
        seconds.update(range(int(first_s), int(first_s + each.total_s) + 1))
    return max(seconds.values(), default=0)


def _times(name: str, seconds: Sequence[float | None]) -> dict[str, float]:
    """Mean, median, deviation and percentiles of those that there are; 0 where there are none, as vLLM has it."""
    known_ms = 1e3 * np.array([each for each in seconds if each is not None] or [0.0])
    return {
        f"mean_{name}_ms": float(np.mean(known_ms)),
        f"median_{name}_ms": float(np.median(known_ms)),
        f"std_{name}_ms": float(np.std(known_ms)),
        **{f"p{each}_{name}_ms": float(np.percentile(known_ms, each)) for each in PERCENTILES},
    }


def write(folder: Path, windows: Sequence[WindowRecord]) -> None:
    """A file for each window, which says in its name what it is of; one of the same name is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for each in windows:
        words = (
            each.system.replace(" ", "_"),
            each.load.arrivals.replace(" ", "_"),
            f"{each.load.rate_per_s:g}qps",
            each.model,
        )
        path = folder / f"{'-'.join(words)}-round{each.round}.json"
        path.write_text(json.dumps(as_vllm(each)) + "\n", encoding="utf-8")
