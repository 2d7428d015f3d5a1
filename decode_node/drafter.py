"""Decides how many tokens an answer drafts with chain 1 before all its chains verify them; no tensors, no threads.

A round of k drafts is k steps of chain 1, whose weights may be quantised for it, and a step that verifies k + 1 tokens
of each answer. It gives an answer

    1 + a + a^2 + .. + a^k tokens,

where a is the probability that a draft is accepted once those before it were: the share of the answer's own drafts that
was, and until it has some, of the answers' before it. What a round takes is measured, with B answers in the batch:

    k * (seconds of a step that drafts B tokens) + (seconds of a step of all chains of B * (k + 1) tokens).

An answer wants the k of most tokens a second, and none where that is not faster than k = 0 by a margin. A step drafts
only while every answer in it wants another draft (`decode_node/scheduler.py`), so the shortest wish holds for all. Each
answer's tokens a second rise up to its own k and fall behind it, so nobody is slower than without drafts.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from statistics import median
from typing import Final, Self

from colm.model import num_step_parameters
from colm.model.config import ChainConfig
from decode_node.plan import MAX_DRAFT_TOKENS, StepPlan
from decode_node.step_budget import FastestSteps, StepBudget

_DRAFTS: Final = 0
"""Stands for the scale of steps that draft: answers at scale 1 may take part in them, or not."""
_MARGIN: Final = 1.03
"""How much faster drafts must promise to be: what is measured is not exact."""
_STALE_STEPS: Final = 128
"""Steps for which a measurement counts, so that what did not pay once is tried again; several count longer."""
_NUM_KEPT: Final = 5
"""Measurements of which the median counts."""
_FIRST_ACCEPTANCE: Final = 0.95
"""What is expected where nothing was seen: high, since drafts that are tried teach more than those that are not."""
_PRIOR_DRAFTS: Final = 4.0
"""So many drafts weigh as much as what was expected of them."""
_MEMORY_DRAFTS: Final = 64
"""About so many drafts an answer remembers, and what it saw of them for four times as many tokens without drafts."""
_MEMORY_ANSWERS: Final = 8
"""About so many answers a node remembers, so that what did not pay for some is tried again by others."""


@dataclass(slots=True)
class _Measured:
    """Steps of one size."""

    num_cached: int
    """Tokens in the cache that the last of them read."""
    at_step: int
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_KEPT))


class StepTimes:
    """What steps take on this node: the median of the last few of the same scale and number of tokens.

    They count for `_STALE_STEPS` steps each, and while the answers have neither twice nor half as many tokens in the
    cache. Until a step was seen, it is taken for what it took as the node started, in proportion to those that were
    seen: a larger cache, or others on the machine, make all of them slower.

    Args:
        num_weights: that a step reads, for each scale; their ratio is what a step of chain 1 takes where nothing better
            is known.
        max_tokens: largest verification to plan.
        budget: of steps, within which verifications stay as well; None for any.
        draft_share: of chain 1's bytes, what a draft reads.
        at_start: what steps took as the node started, for as many steps as other measurements count; None where that
            was not measured.
    """

    def __init__(
        self,
        num_weights: Sequence[int],
        *,
        max_tokens: int,
        budget: StepBudget | None = None,
        draft_share: float = 1.0,
        at_start: FastestSteps | None = None,
    ) -> None:
        self.num_weights = num_weights
        self._draft_share = draft_share
        self._at_start = at_start
        self._max_tokens = max_tokens
        self._budget = budget
        self._measured: dict[tuple[int, int], _Measured] = {}
        self._num_steps = 0
        self._num_cached = 0
        self._scale = len(num_weights)
        self._rounds: dict[int, list[float]] = {}

    @classmethod
    def of(
        cls,
        config: ChainConfig,
        *,
        max_tokens: int,
        budget: StepBudget | None = None,
        draft_share: float = 1.0,
        at_start: FastestSteps | None = None,
    ) -> Self:
        """Of a model."""
        num_weights = [num_step_parameters(config, scale) for scale in range(1, config.num_chains + 1)]
        return cls(num_weights, max_tokens=max_tokens, budget=budget, draft_share=draft_share, at_start=at_start)

    def note(self, plan: StepPlan, seconds: float) -> None:
        """Remember a step; prompts make it another kind of step, and are passed over."""
        if not all(row.num_logits for row in plan.rows):
            return
        self._num_steps += 1
        self._num_cached = sum(row.position for row in plan.rows)
        self._rounds.clear()
        is_draft = any(row.is_draft for row in plan.rows)
        scale = _DRAFTS if is_draft else plan.rows[0].num_chains
        if scale > 1:
            self._scale = scale
        key = scale, sum(len(row.token_ids) for row in plan.rows)
        measured = self._measured.get(key)
        if measured is None or not self._has_context_of(measured):
            measured = self._measured[key] = _Measured(self._num_cached, self._num_steps)
        measured.num_cached, measured.at_step = self._num_cached, self._num_steps
        measured.seconds.append(seconds)

    def rounds(self, num_answers: int) -> list[float]:
        """Seconds of a round of k drafts, for k = 0, 1, ..; of k = 0 alone where none without drafts is known."""
        if (rounds := self._rounds.get(num_answers)) is None:
            rounds = self._rounds[num_answers] = self._estimate(num_answers)
        return rounds

    def _estimate(self, num_answers: int) -> list[float]:
        start = None if self._num_steps > _STALE_STEPS * _NUM_KEPT else self._at_start
        verify = self._of_scale(self._scale)
        if start is not None:
            verify = self._as_now(start.seconds, verify) | verify
        elif num_answers not in verify:
            return [1.0]
        plain_s = _between(verify, num_answers)
        draft = self._of_scale(_DRAFTS)
        draft_s = _between(draft, num_answers) if draft else self._share(start) * plain_s
        max_tokens = self._max_tokens
        if self._budget is not None:
            max_tokens = min(max_tokens, self._budget.tokens(num_answers))
        longest = min(MAX_DRAFT_TOKENS, max_tokens // num_answers - 1)
        return [k * draft_s + _between(verify, num_answers * (k + 1)) for k in range(longest + 1)] or [plain_s]

    def _as_now(self, start: Mapping[int, float], seen: Mapping[int, float]) -> dict[int, float]:
        """Seconds at the start, by number of tokens at full scale, as they would be in the steps that were seen."""
        slower = [seconds / _between(start, num_tokens) for num_tokens, seconds in seen.items()]
        now = median(slower) if slower else self.num_weights[self._scale - 1] / self.num_weights[-1]
        return {num_tokens: now * seconds for num_tokens, seconds in start.items()}

    def _share(self, start: FastestSteps | None) -> float:
        """What a draft takes of a step without drafts, until one was seen: by the node's start, or by bytes."""
        of_all = self._draft_share * self.num_weights[0] / self.num_weights[-1]
        if start is not None and start.draft_s is not None:
            of_all = start.draft_s / start.seconds[1]
        return of_all * self.num_weights[-1] / self.num_weights[self._scale - 1]

    def _of_scale(self, scale: int) -> dict[int, float]:
        """Seconds by number of tokens, as far as they are known."""
        return {
            num_tokens: median(measured.seconds)
            for (of_scale, num_tokens), measured in self._measured.items()
            if of_scale == scale
            and self._num_steps - measured.at_step <= _STALE_STEPS * len(measured.seconds)
            and self._has_context_of(measured)
        }

    def _has_context_of(self, measured: _Measured) -> bool:
        smaller, larger = sorted((measured.num_cached, self._num_cached))
        return larger <= 2 * smaller + 64


def _between(known: Mapping[int, float], num_tokens: int) -> float:
    """Seconds of a step of `num_tokens`: between the nearest that are known; beyond them, the nearest's."""
    below = max((n for n in known if n <= num_tokens), default=None)
    above = min((n for n in known if n >= num_tokens), default=None)
    if below is None or above is None or below == above:
        nearest = above if below is None else below
        assert nearest is not None, "nothing is known"
        return known[nearest]
    share = (num_tokens - below) / (above - below)
    return known[below] + share * (known[above] - known[below])


@dataclass(slots=True)
class Acceptance:
    """How many drafts were accepted, of those whose predecessors were."""

    num_judged: float = _PRIOR_DRAFTS
    num_accepted: float = _PRIOR_DRAFTS * _FIRST_ACCEPTANCE

    @property
    def share(self) -> float:
        """Of accepted ones."""
        return self.num_accepted / self.num_judged

    def note(self, num_judged: int, num_accepted: int) -> None:
        """Add drafts."""
        self.num_judged += num_judged
        self.num_accepted += num_accepted

    def fade(self, part: float) -> None:
        """Forget a part of what was seen, for what is expected where nothing was."""
        self.num_judged += part * (_PRIOR_DRAFTS - self.num_judged)
        self.num_accepted += part * (_PRIOR_DRAFTS * _FIRST_ACCEPTANCE - self.num_accepted)


class Drafting:
    """What the answers of a node share.

    Args:
        times: what steps take.
        max_draft_tokens: most drafts of a round.
    """

    def __init__(self, times: StepTimes, max_draft_tokens: int) -> None:
        self.times = times
        self.acceptance = Acceptance()
        self._max_draft_tokens = max_draft_tokens

    def drafter(self, max_draft_tokens: int | None = None) -> "Drafter | None":
        """For the next answer, which may want fewer drafts a round; None if it wants none."""
        if max_draft_tokens == 0:
            return None
        limit = self._max_draft_tokens
        return Drafter(self, limit if max_draft_tokens is None else min(limit, max_draft_tokens))


class Drafter:
    """Decides for one answer."""

    def __init__(self, drafting: Drafting, max_draft_tokens: int) -> None:
        self._drafting = drafting
        self._max_draft_tokens = max_draft_tokens

    @cached_property
    def acceptance(self) -> Acceptance:
        """Of the answer's own drafts, from its first round on: an answer that stays at chain 1 has none."""
        self._drafting.acceptance.fade(1 / _MEMORY_ANSWERS)
        return Acceptance(_PRIOR_DRAFTS, _PRIOR_DRAFTS * self._drafting.acceptance.share)

    def num_drafts(self, num_answers: int) -> int:
        """How many tokens to draft in a round of so many answers."""
        seconds = self._drafting.times.rounds(num_answers)[: self._max_draft_tokens + 1]
        tokens = accumulate(self.acceptance.share**k for k in range(len(seconds)))
        rates = [each / s for each, s in zip(tokens, seconds, strict=True)]
        best = max(range(len(rates)), key=rates.__getitem__)
        if rates[best] > _MARGIN * rates[0]:
            return best
        self.acceptance.fade(1 / (4 * _MEMORY_DRAFTS))
        return 0

    def note(self, num_accepted: int, *, was_refused: bool) -> None:
        """Learn from a verification: so many drafts were accepted, and the next was refused, if there was one."""
        num_judged = num_accepted + was_refused
        self.acceptance.fade(num_judged / _MEMORY_DRAFTS)
        for each in (self.acceptance, self._drafting.acceptance):
            each.note(num_judged, num_accepted)
