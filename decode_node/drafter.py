"""Decides how many tokens an answer drafts with chain 1 before all its chains verify them; no tensors, no threads.

A round of k drafts is k steps of chain 1 and a step that verifies k + 1 tokens of each answer. It gives an answer

    1 + a + a^2 + .. + a^k tokens,

where a is the probability that a draft is accepted once those before it were. What it takes is measured, with B answers
in the batch:

    k * (seconds of a step of chain 1 of B tokens) + (seconds of a step of all chains of B * (k + 1) tokens).

An answer wants the k of most tokens a second, and none where that is not faster than k = 0 by a margin. A step drafts
only while every answer in it wants another draft (`decode_node/scheduler.py`), so the shortest wish holds for all. Each
answer's tokens a second rise up to its own k and fall behind it, so nobody is slower than without drafts.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median
from typing import Final

from decode_node.plan import MAX_DRAFT_TOKENS, StepPlan

_MARGIN: Final = 1.03
"""How much faster drafts must promise to be: what is measured is not exact."""
_STALE_STEPS: Final = 512
"""Steps after which a measurement is forgotten, so that what did not pay once is tried again."""
_NUM_KEPT: Final = 5
"""Measurements of which the median counts."""
_PRIOR_ACCEPTANCE: Final = 0.8
_PRIOR_DRAFTS: Final = 4.0
"""So many verified drafts weigh as much as the prior."""
_MEMORY_DRAFTS: Final = 64.0
"""About so many verified drafts are remembered."""


@dataclass(slots=True)
class _Measured:
    """Steps of one size."""

    num_cached: int
    """Tokens in the cache that the last of them read."""
    at_step: int
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_KEPT))


class StepTimes:
    """What steps take on this node: the median of the last few of the same scale and number of tokens.

    A measurement counts until it is `_STALE_STEPS` steps old, or until the answers have twice or half as many tokens in
    the cache.

    Args:
        num_weights: that a step reads, for each scale; their ratio is what a step of chain 1 takes until it is seen.
        max_tokens: largest verification to plan.
    """

    def __init__(self, num_weights: Sequence[int], *, max_tokens: int) -> None:
        self._num_weights = num_weights
        self._max_tokens = max_tokens
        self._measured: dict[tuple[int, int], _Measured] = {}
        self._num_steps = 0
        self._num_cached = 0
        self._scale = len(num_weights)
        self._rounds: dict[int, list[float]] = {}

    def note(self, plan: StepPlan, seconds: float) -> None:
        """Remember a step; prompts make it another kind of step, and are passed over."""
        if not all(row.num_logits for row in plan.rows):
            return
        self._num_steps += 1
        self._num_cached = sum(row.position for row in plan.rows)
        self._rounds.clear()
        scale = plan.rows[0].num_chains
        if scale > 1:
            self._scale = scale
        key = scale, sum(len(row.token_ids) for row in plan.rows)
        if (measured := self._fresh(key)) is None:
            measured = self._measured[key] = _Measured(self._num_cached, self._num_steps)
        measured.num_cached, measured.at_step = self._num_cached, self._num_steps
        measured.seconds.append(seconds)

    def rounds(self, num_answers: int) -> list[float]:
        """Seconds of a round of k drafts, for k = 0, 1, ..; only k = 0 where a step without drafts is not known."""
        if (rounds := self._rounds.get(num_answers)) is None:
            rounds = self._rounds[num_answers] = self._estimate(num_answers)
        return rounds

    def _estimate(self, num_answers: int) -> list[float]:
        verify = self._of_scale(self._scale)
        if num_answers not in verify:
            return [0.0]
        plain_s = verify[num_answers]
        draft = self._of_scale(1)
        share = self._num_weights[0] / self._num_weights[self._scale - 1]
        draft_s = _between(draft, num_answers) if draft else share * plain_s
        longest = min(MAX_DRAFT_TOKENS, self._max_tokens // num_answers - 1)
        return [k * draft_s + _between(verify, num_answers * (k + 1)) for k in range(longest + 1)] or [plain_s]

    def _of_scale(self, scale: int) -> dict[int, float]:
        """Seconds by number of tokens, as far as they are known."""
        known = {}
        for key in list(self._measured):
            if key[0] == scale and (measured := self._fresh(key)) is not None:
                known[key[1]] = median(measured.seconds)
        return known

    def _fresh(self, key: tuple[int, int]) -> _Measured | None:
        measured = self._measured.get(key)
        if measured is None:
            return None
        smaller, larger = sorted((measured.num_cached, self._num_cached))
        if self._num_steps - measured.at_step <= _STALE_STEPS and larger <= 2 * smaller + 64:
            return measured
        del self._measured[key]
        return None


def _between(known: dict[int, float], num_tokens: int) -> float:
    """Seconds of a step of `num_tokens`: between the nearest that are known; beyond them, the nearest's."""
    below = max((n for n in known if n <= num_tokens), default=None)
    above = min((n for n in known if n >= num_tokens), default=None)
    if below is None or above is None or below == above:
        nearest = above if below is None else below
        assert nearest is not None, "nothing is known"
        return known[nearest]
    share = (num_tokens - below) / (above - below)
    return known[below] + share * (known[above] - known[below])


class Drafter:
    """Decides for one answer.

    Args:
        times: the node's.
        max_draft_tokens: most drafts of a round.
    """

    def __init__(self, times: StepTimes, max_draft_tokens: int) -> None:
        self._times = times
        self._max_draft_tokens = max_draft_tokens
        self._num_verified = _PRIOR_DRAFTS
        self._num_accepted = _PRIOR_DRAFTS * _PRIOR_ACCEPTANCE

    @property
    def acceptance(self) -> float:
        """The probability that a draft is accepted once those before it were, as estimated."""
        return self._num_accepted / self._num_verified

    def num_drafts(self, num_answers: int) -> int:
        """How many tokens to draft in a round of so many answers."""
        seconds = self._times.rounds(num_answers)[: self._max_draft_tokens + 1]
        if len(seconds) == 1:
            return 0
        tokens = accumulate(self.acceptance**k for k in range(len(seconds)))
        rates = [each / s for each, s in zip(tokens, seconds, strict=True)]
        best = max(range(len(rates)), key=rates.__getitem__)
        return best if rates[best] > _MARGIN * rates[0] else 0

    def note(self, num_accepted: int, *, was_refused: bool) -> None:
        """Learn from a verification: so many drafts were accepted, and the next was refused, if there was one."""
        num_verified = num_accepted + was_refused
        keep = max(0.0, 1 - num_verified / _MEMORY_DRAFTS)
        self._num_verified = keep * self._num_verified + num_verified
        self._num_accepted = keep * self._num_accepted + num_accepted
