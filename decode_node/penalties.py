"""Edits an answer's logits before a token is chosen: logit bias, and penalties of what the text has already.

Counted token by token, drafts included: the row behind a draft is edited as if the draft were a token of the answer,
which it is wherever that row counts. So an answer's tokens are the same with drafts and without.

Shapes: V vocabulary, S tokens that something is done to.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from colm.sampling import SamplingParams

_LARGEST = float(np.finfo(np.float32).max)


class Penalties:
    """The edits of one request; see `SamplingParams` for what they are and in which order.

    Args:
        prompt_token_ids: what the repetition penalty counts besides the answer.
    """

    def __init__(self, params: SamplingParams, prompt_token_ids: Sequence[int] | NDArray[np.int64]) -> None:
        self._params = params
        self._prompt_token_ids = prompt_token_ids if params.repetition_penalty != 1.0 else ()
        self._counts_penalise = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._biased_ids = np.array([token_id for token_id, _ in params.logit_bias], dtype=np.int64)
        self._biases = np.array([bias for _, bias in params.logit_bias], dtype=np.float64)
        # Of the answer. The vocabulary's size is known with the first logits.
        self._counts_V: NDArray[np.int64] | None = None
        self._is_in_prompt_V: NDArray[np.bool_] | None = None
        self._uncounted: list[int] = []

    @classmethod
    def of(cls, params: SamplingParams, prompt_token_ids: Sequence[int] | NDArray[np.int64]) -> Self | None:
        """None for a request that edits nothing."""
        penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty - 1.0)
        return cls(params, prompt_token_ids) if any(penalties) or params.logit_bias else None

    def take(self, token_id: int) -> None:
        """Count a token of the answer."""
        self._uncounted.append(token_id)

    def edited(self, logits_V: NDArray[np.float32], draft_token_ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits of the row behind the answer and some drafts; computed in float64, and finite."""
        edited_V = logits_V.astype(np.float64)
        edited_V[self._biased_ids] += self._biases
        counts_V = self._counted(len(logits_V), draft_token_ids)
        factor = self._params.repetition_penalty
        if factor != 1.0:
            seen_S = np.flatnonzero(self._in_prompt(len(logits_V)) | (counts_V > 0))
            logits_S = edited_V[seen_S]
            edited_V[seen_S] = np.where(logits_S > 0, logits_S / factor, logits_S * factor)
        if self._counts_penalise:
            seen_S = np.flatnonzero(counts_V)
            edited_V[seen_S] -= self._params.frequency_penalty * counts_V[seen_S]
            edited_V[seen_S] -= self._params.presence_penalty
        return edited_V.clip(-_LARGEST, _LARGEST).astype(np.float32)

    def _counted(self, vocab_size: int, draft_token_ids: Sequence[int]) -> NDArray[np.int64]:
        if self._counts_V is None:
            self._counts_V = np.zeros(vocab_size, dtype=np.int64)
        np.add.at(self._counts_V, self._uncounted, 1)
        self._uncounted = []
        if not draft_token_ids:
            return self._counts_V
        counts_V = self._counts_V.copy()
        np.add.at(counts_V, draft_token_ids, 1)
        return counts_V

    def _in_prompt(self, vocab_size: int) -> NDArray[np.bool_]:
        if self._is_in_prompt_V is None:
            self._is_in_prompt_V = np.zeros(vocab_size, dtype=bool)
            self._is_in_prompt_V[np.asarray(self._prompt_token_ids, dtype=np.int64)] = True
        return self._is_in_prompt_V
