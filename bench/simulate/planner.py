"""How few replicas of each pool keep an objective: the least sum, found by simulating one number after the other.

More replicas of a pool are taken to be no worse, and `PLENTY` times as many as would never be idle to be as good as any
number. First come the decode replicas that do with plenty of prefill
replicas, then the prefill replicas that do with those; then a few more decode replicas, as long as they save others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Final

from bench.roofline.model import Prompt, prefill_s
from bench.simulate.cluster import Simulated
from bench.simulate.costs import KV_DTYPE, DecodeWork
from bench.simulate.figures import Figures
from bench.simulate.options import Question, bytes_per_s
from bench.simulate.requests import SimRequest
from colm.kv import KvFormat

PLENTY: Final = 4
WARM_UP: Final = 0.2
"""Of the requests come before there is a load, and do not count."""
_MORE_DECODE: Final = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What so many in 100 requests must have, both of it; none may be refused."""

    ttft_s: float
    tpot_s: float
    percent: int = 95

    def missed(self, request: SimRequest) -> bool:
        """Whether a request has not what it must have."""
        ttft_s, tpot_s = request.ttft_s, request.tpot_s
        return ttft_s is None or ttft_s > self.ttft_s or (tpot_s is not None and tpot_s > self.tpot_s)

    @classmethod
    def parse(cls, text: str) -> "Objective":
        """Read `TTFT_S,TPOT_S` or `TTFT_S,TPOT_S,PERCENT`.

        Raises:
            ValueError: it is neither.
        """
        parts = text.split(",")
        try:
            ttft_s, tpot_s, percent = float(parts[0]), float(parts[1]), int((parts[2:] or ["95"])[0])
        except (IndexError, ValueError):
            ttft_s = tpot_s = percent = 0
        if len(parts) > 3 or not (ttft_s > 0 and tpot_s > 0 and 1 <= percent <= 100):
            raise ValueError(f"{text!r} is not TTFT_S,TPOT_S or TTFT_S,TPOT_S,PERCENT, e.g. 0.5,0.05,95")
        return cls(ttft_s=ttft_s, tpot_s=tpot_s, percent=percent)

    def __str__(self) -> str:
        return f"{self.percent} in 100: first token in {self.ttft_s:g} s, then {self.tpot_s * 1e3:g} ms a token"


class _Missed(Exception):
    """The objective cannot be met any more."""


class _Watch:
    """Ends a simulation as soon as its objective is missed, whatever is still to come.

    Args:
        objective: to be met.
        num_requests: of the workload, those of the warm-up included.
    """

    def __init__(self, objective: Objective, num_requests: int) -> None:
        self._objective = objective
        self._first = int(WARM_UP * num_requests)
        self._num_allowed = (num_requests - self._first) * (100 - objective.percent) // 100

    def __call__(self, request: SimRequest) -> None:
        """See what has become of a request."""
        if request.number < self._first:
            return
        self._num_allowed -= self._objective.missed(request)
        if request.error or self._num_allowed < 0:
            raise _Missed


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The replicas that do, and how they do."""

    num_prefill: int
    num_decode: int
    figures: Figures


def plan(question: Question, network_gbit: float, objective: Objective, tell: Callable[[str], None]) -> Answer | None:
    """The fewest replicas; None where plenty of each do not.

    Args:
        question: the model, its machine and the workload.
        network_gbit: of each replica's link.
        objective: to be met.
        tell: told of each simulation, in words.
    """
    found: dict[tuple[int, int], Simulated | None] = {}

    def meets(num_prefill: int, num_decode: int) -> bool:
        key = num_prefill, num_decode
        if key not in found:
            try:
                found[key] = question.ask(*key, network_gbit, _Watch(objective, question.workload.num_requests))
            except _Missed:
                found[key] = None
            does = "do not" if found[key] is None else "do"
            tell(f"{network_gbit:g} Gb/s, {objective}: {num_prefill} prefill and {num_decode} decode {does}")
        return found[key] is not None

    best = cheapest(meets, *estimate(question, network_gbit))
    if best is None:
        return None
    simulated = found[best]
    assert simulated is not None
    return Answer(num_prefill=best[0], num_decode=best[1], figures=Figures.of(simulated))


def cheapest(meets: Callable[[int, int], bool], prefill: int, decode: int) -> tuple[int, int] | None:
    """The least sum of (prefill, decode) replicas that does, as this module's docstring says; None where plenty do not.

    Args:
        meets: whether so many prefill and decode replicas do.
        prefill: where the search begins.
        decode: likewise.
    """

    def with_decode(num_decode: int) -> Callable[[int], bool]:
        return lambda num_prefill: meets(num_prefill, num_decode)

    plenty = PLENTY * (prefill + 1)
    first = fewest(partial(meets, plenty), decode, most=PLENTY * (decode + 1))
    if first is None:
        return None
    best = plenty, first
    for num_decode in range(first, first + 1 + _MORE_DECODE):
        most = sum(best) - num_decode - (num_decode > first)  # else their sum is no less
        if (num_prefill := fewest(with_decode(num_decode), prefill, most=most)) is not None:
            best = num_prefill, num_decode
    return best


def estimate(question: Question, network_gbit: float) -> tuple[int, int]:
    """Replicas of which none would ever be idle: where a search begins."""
    config, costs = question.config, question.costs
    requests = list(question.workload.requests(question.seed))[:500]
    rate, limits = question.workload.rate_per_s, question.template.decode
    token_bytes = KvFormat.of(config, KV_DTYPE).token_bytes
    busy_s = 0.0
    for each in requests:
        prompt = Prompt(config=config, num_tokens=each.num_prompt_tokens, tile_tokens=costs.tile_tokens)
        wire_s = each.num_prompt_tokens * token_bytes / bytes_per_s(network_gbit)
        busy_s += max(prefill_s(costs.machine, prompt), wire_s)
    tokens = sum(each.num_new_tokens for each in requests) / len(requests)
    contexts = limits.max_batch_size * sum(each.num_prompt_tokens for each in requests) // len(requests)
    work = DecodeWork(num_tokens={question.workload.num_chains: limits.max_batch_size}, num_context_tokens=contexts)
    decode = rate * tokens * costs.decode_step_s(work) / limits.max_batch_size
    return max(1, ceil(rate * busy_s / len(requests))), max(1, ceil(decode))


def fewest(does: Callable[[int], bool], start: int, *, most: int) -> int | None:
    """The least number that does, where all greater ones do as well; None where `most` does not.

    Args:
        does: asked as few times as may be.
        start: where the search begins.
        most: not more are tried.
    """
    if most < 1 or not does(most):
        return None
    low, high, middle = 0, most, min(start, most - 1)
    while high - low > 1:
        if does(middle):
            high = middle
        else:
            low = middle
        # Near the start first, where the answer should be.
        middle = min((low + high) // 2, low + max(1, low // 2)) if low else (low + high) // 2
    return high
