"""Describes a decode step: query tokens row by row, and which of them get logits. No tensors, no asyncio.

Shapes: M pages of a request.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

MAX_DRAFT_TOKENS: Final = 15
"""Most drafts that a step verifies: with the token before them they are one row, of at most `MAX_QUERY_TOKENS`."""


@dataclass(frozen=True, slots=True)
class PlanRow:
    """Next tokens of an answer's text, which attend to all before them, be it in the cache or in the same step."""

    token_ids: tuple[int, ...]
    """The tokens to read, 1 to `MAX_QUERY_TOKENS`; their keys and values are written from `position` on."""
    position: int
    """How many tokens precede them in the cache."""
    num_chains: int
    """The scale at which they run."""
    table_M: NDArray[np.int32]
    """The answer's page ids; the same array at every step."""
    num_logits: int = 1
    """How many of the last tokens get logits: 0 where the cache only catches up, 1 for the next token, all of them to
    verify a draft."""
    is_draft: bool = False
    """Whether what it writes and chooses will be verified: another row will read its token again, and write over it."""

    @property
    def chosen_positions(self) -> range:
        """Where in the text the tokens are that its logits choose."""
        end = self.position + len(self.token_ids) + 1
        return range(end - self.num_logits, end)

    def __post_init__(self) -> None:
        assert self.token_ids, "a row without tokens"
        assert 0 <= self.num_logits <= len(self.token_ids), f"{self.num_logits} logits of {len(self.token_ids)} tokens"


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The rows of one step, those of larger scale first."""

    rows: tuple[PlanRow, ...]

    def __post_init__(self) -> None:
        assert self.rows, "a step without rows"
        # Each chain's weights are then read once, for a leading run of rows.
        scales = [row.num_chains for row in self.rows]
        assert scales == sorted(scales, reverse=True), f"rows at scales {scales}, expected larger ones first"

    @property
    def only_drafts(self) -> bool:
        """Whether nothing of it lasts: the weights need not be those of the answers."""
        return all(row.is_draft for row in self.rows)
