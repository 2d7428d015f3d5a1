"""Says how many tokens a decode step reads: as many as ride on one reading of the weights. No tensors, no asyncio.

A step reads every weight once, for all its tokens. As long as computing them takes no longer than reading, further
tokens cost little; beyond, each costs as much as the one before. Where that is depends on the processor, the model and
how its weights lie, so a node measures it as it starts.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Final

from colm.clock import Clock

logger = logging.getLogger(__name__)

RIDE: Final = 2
"""A step of the budget takes at most so many times as long as one of a single token: there, tokens cost about as much
as the weights."""
MIN_STEP_TOKENS: Final = 2
"""One of the answer that goes on, and one of a prompt."""
TILE_TOKENS: Final = 8
"""Multiples of this are measured, since the kernels multiply so many rows at a time. It is the smallest budget, too."""
_MIN_ROUNDS, _ENOUGH_S = 2, 0.4
"""Sizes are measured in rounds, until so much time is over: what disturbs a step makes it slower, so the fastest of
each size counts. A large model is measured twice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBudget:
    """How many tokens a step reads, prompts' and drafts' included."""

    step_tokens: int
    """Where one answer goes on, which waits for all others' tokens."""
    max_tokens: int
    """Where none does."""

    def __post_init__(self) -> None:
        if self.step_tokens < MIN_STEP_TOKENS:
            raise ValueError(f"step_tokens={self.step_tokens} must be at least {MIN_STEP_TOKENS}, or no prompt is read")

    def tokens(self, num_going: int) -> int:
        """Most tokens of a step in which so many answers go on, one of each among them.

        It then takes at most `RIDE` times as long as those answers' tokens alone would. With s seconds a token beyond
        the first, t1 + (step_tokens - 1) s = 2 t1, so 2 (t1 + (n - 1) s) is the time of step_tokens + 2 (n - 1) tokens.
        """
        if not num_going:
            return max(self.max_tokens, self.step_tokens)
        return self.step_tokens + RIDE * (num_going - 1)


def measure(step: Callable[[int], object], clock: Clock, *, max_tokens: int) -> int:
    """Find how many tokens ride on one reading of the weights.

    Between two sizes that were measured, time is taken to grow evenly.

    Args:
        step: runs a step of so many tokens at full scale.
        clock: measures it.
        max_tokens: not more are tried.
    """
    sizes = [1, *range(TILE_TOKENS, max_tokens + 1, TILE_TOKENS)]
    fastest_s = dict.fromkeys(sizes, inf)
    step(1)  # the first one touches memory that nobody has
    first_s, num_rounds = clock.now(), 0
    while num_rounds < _MIN_ROUNDS or clock.now() - first_s < _ENOUGH_S:
        num_rounds += 1
        for num_tokens in sizes:
            began_s = clock.now()
            step(num_tokens)
            fastest_s[num_tokens] = min(fastest_s[num_tokens], clock.now() - began_s)
            if fastest_s[num_tokens] > RIDE * fastest_s[1]:
                break
    found = max(MIN_STEP_TOKENS, min(TILE_TOKENS, max_tokens), _most_within(RIDE * fastest_s[1], fastest_s))
    times_ms = ",".join(f"{size}:{seconds * 1e3:.1f}" for size, seconds in fastest_s.items() if seconds < inf)
    logger.info("decode.measured step_tokens=%d step_ms=%s", found, times_ms)
    return found


def _most_within(limit_s: float, fastest_s: Mapping[int, float]) -> int:
    """The size at which steps begin to take longer than the limit; the largest where none does."""
    for (below, below_s), (above, above_s) in pairwise(fastest_s.items()):
        if above_s > limit_s:
            return below + int((above - below) * (limit_s - below_s) / (above_s - below_s))
    return max(fastest_s)
