"""Says how many tokens a decode step reads: as many as ride on one reading of the weights. No tensors, no asyncio.

A step reads every weight once, for all its tokens. As long as computing them takes no longer than reading, further
tokens cost little; beyond, each costs as much as the one before. Where that is depends on the processor, the model and
how its weights lie, so a node measures it as it starts. What drafts are planned by is measured with it.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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
FEW_TOKENS: Final = (4, 6)
"""Measured too where answers may draft: up to one of these, by processor, a few rows take hardly longer than one."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class FastestSteps:
    """What steps take on a node that starts, with nothing in its cache: the fastest of each kind."""

    seconds: Mapping[int, float]
    """At full scale, by number of tokens, ascending; 1 is among them."""
    max_tokens: int
    """Not more were tried."""
    draft_s: float | None = None
    """Of one that drafts a token; None where answers may not draft."""

    @property
    def num_riding(self) -> int:
        """How many tokens ride on one reading of the weights.

        Between two sizes that were measured, time is taken to grow evenly.
        """
        found = _most_within(RIDE * self.seconds[1], self.seconds)
        return max(MIN_STEP_TOKENS, min(TILE_TOKENS, self.max_tokens), found)


def measure(
    step: Callable[[int], object], clock: Clock, *, max_tokens: int, draft: Callable[[], object] | None = None
) -> FastestSteps:
    """Find what steps take, up to the size that takes `RIDE` times as long as a single token.

    Args:
        step: runs a step of so many tokens at full scale.
        clock: measures it.
        max_tokens: not more are tried.
        draft: runs a step that drafts a token; None where answers may not draft.
    """
    few = () if draft is None else FEW_TOKENS
    sizes = [1, *(size for size in few if size <= max_tokens), *range(TILE_TOKENS, max_tokens + 1, TILE_TOKENS)]
    fastest_s, draft_s = dict.fromkeys(sizes, inf), inf

    def timed_s(run: Callable[[], object]) -> float:
        began_s = clock.now()
        run()
        return clock.now() - began_s

    for run in (partial(step, 1), draft):  # the first one of each touches memory that nobody has
        if run is not None:
            run()
    first_s, num_rounds = clock.now(), 0
    while num_rounds < _MIN_ROUNDS or clock.now() - first_s < _ENOUGH_S:
        num_rounds += 1
        if draft is not None:
            draft_s = min(draft_s, timed_s(draft))
        for num_tokens in sizes:
            fastest_s[num_tokens] = min(fastest_s[num_tokens], timed_s(partial(step, num_tokens)))
            if num_tokens >= TILE_TOKENS and fastest_s[num_tokens] > RIDE * fastest_s[1]:
                break
    seconds = {size: fastest for size, fastest in fastest_s.items() if fastest < inf}
    found = FastestSteps(seconds=seconds, max_tokens=max_tokens, draft_s=None if draft is None else draft_s)
    logger.info(
        "decode.measured step_tokens=%d step_ms=%s draft_ms=%s",
        found.num_riding,
        ",".join(f"{size}:{fastest * 1e3:.1f}" for size, fastest in seconds.items()),
        "none" if draft is None else f"{draft_s * 1e3:.1f}",
    )
    return found


def _most_within(limit_s: float, fastest_s: Mapping[int, float]) -> int:
    """The size at which steps begin to take longer than the limit; the largest where none does."""
    for (below, below_s), (above, above_s) in pairwise(fastest_s.items()):
        if above_s > limit_s:
            return below + int((above - below) * (limit_s - below_s) / (above_s - below_s))
    return max(fastest_s)
