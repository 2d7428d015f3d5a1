"""A prefilled prompt in a decode node's pages, and what the node's engine makes of texts that follow it.

Shapes: N tokens of the prompt, T tokens of a text behind it, Q tokens with logits, V vocabulary, M pages.
"""

from collections.abc import Sequence

import numpy as np
import torch
from colm_kernels.decode_attention import MAX_QUERY_TOKENS
from numpy.typing import NDArray
from torch import Tensor

from bench.quality.metrics import negative_log_likelihoods
from colm.checkpoint import Checkpoint
from colm.defaults import PAGE_TOKENS
from colm.kv import KvFormat, KvTile
from decode_node.engine import DecodeEngine
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from decode_node.plan import PlanRow, StepPlan


class Reading:
    """The prompt's pages, which every text shares, and pages of its own for each text.

    Args:
        checkpoint: the model, of which chain 1 reads.
        kv_format: of the keys and values.
        num_tokens: of the prompt; whole pages.
        num_text_tokens: of the longest text.
        num_texts: texts that are read at once.
    """

    def __init__(
        self, checkpoint: Checkpoint, kv_format: KvFormat, *, num_tokens: int, num_text_tokens: int, num_texts: int
    ) -> None:
        if num_tokens % PAGE_TOKENS:
            raise ValueError(f"num_tokens={num_tokens} must be a multiple of {PAGE_TOKENS}, whole pages")
        layout = KvLayout(kv_format, PAGE_TOKENS)
        shared, own = layout.pages(num_tokens), layout.pages(num_text_tokens)
        self._num_tokens = num_tokens
        self._store = KvStore(layout, shared + num_texts * own)
        pages_M = np.arange(self._store.num_pages, dtype=np.int32)
        texts = np.split(pages_M[shared:], num_texts)
        self._tables = [np.concatenate([pages_M[:shared], text_M]) for text_M in texts]
        self._engine = DecodeEngine(checkpoint, self._store)

    def write(self, tile: KvTile) -> None:
        """Keep a tile of the prompt."""
        self._store.write(self._tables[0], tile)

    def nlls(self, token_ids_T: NDArray[np.int64]) -> Tensor:
        """-ln p of every token of one text but the first, float64 [T - 1]."""
        found = []
        for start in range(0, len(token_ids_T) - 1, MAX_QUERY_TOKENS):
            read = token_ids_T[start : min(start + MAX_QUERY_TOKENS, len(token_ids_T) - 1)]
            logits_QV = self._step([read], self._num_tokens + start, len(read))
            following_Q = torch.from_numpy(token_ids_T[start + 1 : start + 1 + len(read)])
            found.append(negative_log_likelihoods(logits_QV, following_Q))
        return torch.cat(found)

    def are_answered(self, questions: Sequence[NDArray[np.int64]], answers: Sequence[NDArray[np.int64]]) -> list[bool]:
        """Whether greedy decoding goes on from each question with its answer.

        It does exactly if every token of the answer is the likeliest after those before it, so all are read at once.

        Args:
            questions: with its answer, each has at most `MAX_QUERY_TOKENS` + 1 tokens.
            answers: of equal length.
        """
        (num_answer_tokens,) = {len(answer) for answer in answers}
        texts = [np.concatenate([question, answer])[:-1] for question, answer in zip(questions, answers, strict=True)]
        logits_QV = self._step(texts, self._num_tokens, num_answer_tokens)
        chosen = logits_QV.argmax(dim=1).view(len(answers), num_answer_tokens)
        return (chosen == torch.from_numpy(np.stack(answers))).all(dim=1).tolist()

    def _step(self, texts: Sequence[NDArray[np.int64]], position: int, num_logits: int) -> Tensor:
        tables = self._tables[: len(texts)]
        return self._engine.step(
            StepPlan(
                tuple(
                    PlanRow(tuple(text.tolist()), position, 1, table_M, num_logits)
                    for text, table_M in zip(texts, tables, strict=True)
                )
            )
        )
