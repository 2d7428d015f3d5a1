"""Decides how many chains a loaded node spends on answers that leave it to the node. No tensors, and no clock.

The node is overloaded while somebody waits for it, or while a step takes `SLOW` times as long as that of one answer
alone at full scale. After `SHED_S` of that the level falls by a chain; it rises by one after `REGAIN_S` in which nobody
waited and the step would not be slow, by the share of weights that it reads more, at the level above. What lies between
the two changes nothing, so a steady load leads to a steady level.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

SLOW: Final = 2.0
"""An answer's share of the node is halved: twice as long a step is where its rows cost about as much as its weights."""
CALM: Final = 1.5
"""No more than this is expected of the level above before it is taken."""
SHED_S: Final = 0.25
"""Longer than the prompt of a newcomer, which slows one step down; a request waits no longer before scale gives way."""
REGAIN_S: Final = 2.0
_NUM_KEPT: Final = 5
"""Steps of which the median counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What a step says of the node."""

    now_s: float
    num_waiting: int
    """For a place in the batch, or for pages."""
    num_answers: int
    """In the step."""
    num_chains: int
    """Largest scale of its rows."""
    plain_s: float | None
    """How long it took; None where drafts or a prompt made it another kind of step."""


class AutoScale:
    """The level of a node: answers that leave their scale to it use no more chains, unless they asked for more.

    Args:
        num_weights: that a step reads, for each scale.
    """

    def __init__(self, num_weights: Sequence[int]) -> None:
        self._num_weights = num_weights
        self.level = len(num_weights)
        self._alone = deque[float](maxlen=_NUM_KEPT)
        self._recent = deque[float](maxlen=_NUM_KEPT)
        """Plain steps at this level."""
        self._overloaded_since_s: float | None = None
        self._calm_since_s: float | None = None

    def rest(self) -> None:
        """Note that the node has nothing to do."""
        self._move(len(self._num_weights) - self.level)

    def note(self, load: Load) -> None:
        """Learn from a step, and change the level by one chain at most."""
        if load.plain_s is not None:
            self._recent.append(load.plain_s)
            if load.num_answers == 1 and load.num_chains == len(self._num_weights):
                self._alone.append(load.plain_s)
        slowness = self._slowness()
        if load.num_waiting or slowness > SLOW:
            self._calm_since_s = None
            self._overloaded_since_s = load.now_s if self._overloaded_since_s is None else self._overloaded_since_s
            if self.level > 1 and load.now_s - self._overloaded_since_s >= SHED_S:
                self._move(-1)
        elif self.level < len(self._num_weights) and slowness * self._growth() <= CALM:
            self._overloaded_since_s = None
            self._calm_since_s = load.now_s if self._calm_since_s is None else self._calm_since_s
            if load.now_s - self._calm_since_s >= REGAIN_S:
                self._move(1)
        else:
            self._overloaded_since_s = self._calm_since_s = None

    def _slowness(self) -> float:
        """How much longer a step takes than that of one answer alone; 0 while nobody knows."""
        return median(self._recent) / median(self._alone) if self._recent and self._alone else 0.0

    def _growth(self) -> float:
        """How much longer a step takes at most at the level above."""
        return self._num_weights[self.level] / self._num_weights[self.level - 1]

    def _move(self, num_chains: int) -> None:
        self.level += num_chains
        self._overloaded_since_s = self._calm_since_s = None
        self._recent.clear()
