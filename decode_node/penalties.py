"""Edits an answer's logits before a token is chosen: logit bias, and penalties of what the text has already.

Counted token by token, drafts included: the row behind a draft is edited as if the draft were a token of the answer,
which it is wherever that row counts. So an answer's tokens are the same with drafts and without.

Shapes: V vocabulary, S tokens that have a bias or a penalty.
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
        self._biased_ids = np.array([token_id for token_id, _ in params.logit_bias], dtype=np.int64)
        self._biases = np.array([bias for _, bias in params.logit_bias], dtype=np.float64)
        # Of the answer. The vocabulary's size is known with the first logits.
        self._counts_V: NDArray[np.int32] | None = None
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
        params, counts_V = self._params, self._counted(len(logits_V), draft_token_ids)
        is_seen_V = counts_V > 0
        if params.repetition_penalty != 1.0:
            is_seen_V |= self._in_prompt(len(logits_V))
        is_edited_V = is_seen_V.copy()
        is_edited_V[self._biased_ids] = True
        ids_S = np.flatnonzero(is_edited_V)
        logits_S = logits_V[ids_S].astype(np.float64)
        logits_S[ids_S.searchsorted(self._biased_ids)] += self._biases
        if params.repetition_penalty != 1.0:
            penalised_S = np.where(
                logits_S > 0, logits_S / params.repetition_penalty, logits_S * params.repetition_penalty
            )
            logits_S = np.where(is_seen_V[ids_S], penalised_S, logits_S)
        counts_S = counts_V[ids_S]
        logits_S -= params.frequency_penalty * counts_S
        logits_S -= params.presence_penalty * (counts_S > 0)
        edited_V = logits_V.copy()
        edited_V[ids_S] = logits_S.clip(-_LARGEST, _LARGEST)
        return edited_V

    def _counted(self, vocab_size: int, draft_token_ids: Sequence[int]) -> NDArray[np.int32]:
        if self._counts_V is None:
            self._counts_V = np.zeros(vocab_size, dtype=np.int32)
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
