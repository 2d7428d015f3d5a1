"""What became of requests: each one's own times, and over all of them percentiles and goodput."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, Self, get_args

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from bench.harness.percentile import percentile
from bench.serving.trace import Strict

Outcome = Literal["finished", "refused", "late", "failed"]
"""How a request ended: with its answer; refused for want of room; its deadline came first; anything else."""
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class Answered(Strict):
    """One request and its one outcome. All times count from the moment at which it was to arrive."""

    at_s: NonNegativeFloat
    """When it was to arrive, from the beginning of the window."""
    sent_late_s: NonNegativeFloat
    """How much later the client sent it, being busy itself."""
    num_prompt_tokens: PositiveInt
    prefix: NonNegativeInt | None
    max_new_tokens: PositiveInt
    num_new_tokens: NonNegativeInt
    outcome: Outcome
    error: str
    """The error's class and words; empty of a finished one."""
    ttft_s: NonNegativeFloat | None
    """Time to the first token; None if none came."""
    tpot_s: NonNegativeFloat | None
    """Time per output token after the first; None without a second."""
    longest_gap_s: NonNegativeFloat | None
    """Longest time between two tokens; None without a second."""
    total_s: NonNegativeFloat
    """To its end, whichever."""
    queue_s: NonNegativeFloat | None
    """How long it waited, as the server says when it has finished."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        assert (self.ttft_s is None) == (self.num_new_tokens == 0), "a first token has a time"
        assert (self.tpot_s is None) == (self.longest_gap_s is None) == (self.num_new_tokens < 2), "as has a second"
        is_whole = self.outcome != "finished" or 0 < self.num_new_tokens <= self.max_new_tokens
        assert is_whole, "a finished answer has tokens, and no more than were asked for"
        assert (self.outcome == "finished") == (not self.error), "what has no answer has an error"
        return self


class Objective(Strict):
    """What users want of each request."""

    first_s: NonNegativeFloat
    """Time to the first token that is allowed to every prompt."""
    first_s_per_token: NonNegativeFloat
    """And to each of its tokens."""
    token_s: PositiveFloat
    """Time per output token."""

    def is_met(self, each: Answered) -> bool:
        """Whether a request was served as it should be, to its end."""
        if each.outcome != "finished" or each.ttft_s is None:
            return False
        allowed_s = self.first_s + self.first_s_per_token * each.num_prompt_tokens
        return each.ttft_s <= allowed_s and (each.tpot_s is None or each.tpot_s <= self.token_s)

    def __str__(self) -> str:
        return (
            f"first token within {self.first_s:g} s + {1e3 * self.first_s_per_token:g} ms a prompt token, then at most "
            f"{1e3 * self.token_s:g} ms a token"
        )


class Percentiles(Strict):
    """Of one time over many requests. None: so many requests never had it, so it is as good as infinite."""

    p50: float | None
    p95: float | None
    p99: float | None
    num: NonNegativeInt
    """Requests that count."""

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Self:
        """Of all values; a missing one is later than any other."""
        known = [math.inf if value is None else value for value in values]

        def at(percent: int) -> float | None:
            found = percentile(known, percent) if known else math.inf
            return None if math.isinf(found) else found

        return cls(p50=at(50), p95=at(95), p99=at(99), num=len(known))


class Summary(Strict):
    """Of all requests of a window, or of several windows of one load."""

    num_requests: PositiveInt
    outcomes: dict[Outcome, NonNegativeInt]
    """Their sum is the number of requests."""
    ttft_s: Percentiles
    """Of all requests; one that got no token has none."""
    tpot_s: Percentiles
    """Of those with at least two tokens."""
    longest_gap_s: Percentiles
    """Of the same."""
    total_s: Percentiles
    """Of all requests; one that did not finish has none."""
    queue_s: Percentiles
    """Of those that finished."""
    sent_late_s: Percentiles
    """The client's own delay, which is in the other times."""
    num_met: NonNegativeInt
    """That met the objective."""
    goodput_per_s: NonNegativeFloat
    """They, by the seconds of arrivals."""
    new_tokens_per_s: NonNegativeFloat
    """All new tokens, by the same."""

    @classmethod
    def of(cls, requests: Sequence[Answered], objective: Objective, seconds: float) -> Self:
        """Of requests that arrived in windows of so many seconds together."""
        counts = Counter(each.outcome for each in requests)
        num_met = sum(map(objective.is_met, requests))
        with_gaps = [each for each in requests if each.tpot_s is not None]
        finished = [each for each in requests if each.outcome == "finished"]
        return cls(
            num_requests=len(requests),
            outcomes={name: counts[name] for name in OUTCOMES},
            ttft_s=Percentiles.of(each.ttft_s for each in requests),
            tpot_s=Percentiles.of(each.tpot_s for each in with_gaps),
            longest_gap_s=Percentiles.of(each.longest_gap_s for each in with_gaps),
            total_s=Percentiles.of(each.total_s if each.outcome == "finished" else None for each in requests),
            queue_s=Percentiles.of(each.queue_s for each in finished),
            sent_late_s=Percentiles.of(each.sent_late_s for each in requests),
            num_met=num_met,
            goodput_per_s=num_met / seconds,
            new_tokens_per_s=sum(each.num_new_tokens for each in requests) / seconds,
        )
