"""Says which tokens may follow in an answer that is held to a grammar.

Shapes: V vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from colm.errors import InvalidRequest
from colm.sampling import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher


_MAX_STEP_S: Final = 0.5
"""Processor time of one row's mask, for which all answers wait; usually it takes 0.1 ms."""


@dataclass(slots=True)
class Grammar:
    """A constraint, compiled for a vocabulary."""

    matcher: "LLMatcher"
    """At its beginning. Its copies share what they learn of it, and the limit of that."""
    constraint: Constraint
    vocab_size: int
    """Of the model's table; the grammar's end comes behind it."""
    is_worn: bool = False
    """A limit was reached, by which others would end too."""


class ConstrainedText:
    """The place in a grammar that an answer has reached, and what drafts behind it would reach.

    The grammar's state is that of the answer's own tokens. For a row behind drafts it reads these and is taken back.

    Args:
        grammar: what the answer is held to.
    """

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._matcher = grammar.matcher.deep_copy()
        self._token_ids: list[int] = []
        # By the drafts before the row. Chain 1 asks for a draft's row, then all chains for the same one.
        self._allowed: dict[tuple[int, ...], tuple[NDArray[np.bool_], bool]] = {}

    def take(self, token_id: int) -> None:
        """Go on by a token of the answer.

        Raises:
            InvalidRequest: the grammar does not allow it, or takes too much.
        """
        self._allowed.clear()
        self._token_ids.append(token_id)
        if not self._sound().consume_token(token_id):
            raise self._refusal(f"must allow token {len(self._token_ids)} of the answer: {self._matcher.get_error()}")

    @property
    def has_ended(self) -> bool:
        """Whether the answer is complete and nothing can follow."""
        if not self._matcher.is_accepting():
            return False
        allowed_V, _ = self.allowed(())
        return not allowed_V.any()

    def allowed(self, draft_token_ids: Sequence[int]) -> tuple[NDArray[np.bool_], bool]:
        """Which tokens may follow the answer and some drafts, and whether it may end there.

        Behind drafts that the grammar does not allow, or that end the answer, nothing counts, and anything may follow.

        Raises:
            InvalidRequest: it takes too much to tell, or the vocabulary has no token to go on with.
        """
        drafts = tuple(draft_token_ids)
        if drafts not in self._allowed:
            self._allowed[drafts] = self._explore(drafts)
        return self._allowed[drafts]

    def _explore(self, drafts: tuple[int, ...]) -> tuple[NDArray[np.bool_], bool]:
        matcher = self._sound()
        if matcher.validate_tokens(list(drafts)) < len(drafts):
            return np.ones(self._grammar.vocab_size, dtype=bool), True
        began_s = time.thread_time()
        matcher.consume_tokens(list(drafts))
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        may_follow = np.unpackbits(bits, bitorder="little").view(bool)
        if matcher.is_error() or time.thread_time() - began_s > _MAX_STEP_S:
            self._grammar.is_worn = True
            raise self._refusal(f"takes too much behind token {len(self._token_ids)}: {matcher.get_error()}")
        vocab_size = self._grammar.vocab_size
        allowed_V, may_end = may_follow[:vocab_size], bool(may_follow[vocab_size])
        matcher.rollback(len(drafts))
        if not may_end and not allowed_V.any():
            raise self._refusal(f"no token of the vocabulary goes on behind token {len(self._token_ids)}")
        return allowed_V, may_end

    def _sound(self) -> "LLMatcher":
        """The matcher; made anew where exploring drafts has broken it, which ends no answer that takes none of them."""
        if self._matcher.is_error():
            self._matcher = self._grammar.matcher.deep_copy()
            self._matcher.consume_tokens(self._token_ids)
        return self._matcher

    def _refusal(self, limit: str) -> InvalidRequest:
        constraint = self._grammar.constraint
        return InvalidRequest(constraint.kind, constraint.text, limit)
