"""A prefilled prompt in a decode node's pages, and what the node's engine makes of texts that follow it.

Shapes: T tokens of a text behind the prompt, Q tokens of it that are read at once, V vocabulary.
"""

from collections.abc import Iterator

import numpy as np
import torch
from colm_kernels.decode_attention import MAX_QUERY_TOKENS
from numpy.typing import NDArray
from torch import Tensor

from bench.quality.metrics import negative_log_likelihoods
from colm.checkpoint import Checkpoint
from colm.defaults import PAGE_TOKENS
from colm.kv import KvFormat, KvTile
from colm.model.weights import WeightLayout
from decode_node.engine import DecodeEngine
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from decode_node.plan import PlanRow, StepPlan
from decode_node.settings import KvCacheDtype


class Reading:
    """The prompt's pages and some behind them, into which each text writes in place of the one before it.

    Args:
        checkpoint: the model, of which chain 1 reads.
        kv_format: of the keys and values.
        num_tokens: of the prompt.
        max_text_tokens: of the longest text.
        num_chains: the scale at which texts are read.
        weights: how the engine keeps them; None as stored.
        cache_dtype: of the pages.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        kv_format: KvFormat,
        *,
        num_tokens: int,
        max_text_tokens: int,
        num_chains: int = 1,
        weights: WeightLayout | None = None,
        cache_dtype: KvCacheDtype = "model",
    ) -> None:
        layout = KvLayout(kv_format, PAGE_TOKENS, cache_dtype)
        self._num_tokens = num_tokens
        self._store = KvStore(layout, layout.pages(num_tokens + max_text_tokens))
        self._table_M = np.arange(self._store.num_pages, dtype=np.int32)
        self._num_chains = num_chains
        self._engine = DecodeEngine(checkpoint, self._store, weights=weights)

    @property
    def weight_bytes(self) -> int:
        """What a step reads of the weights."""
        return self._engine.weight_bytes(self._num_chains)

    @property
    def token_bytes(self) -> int:
        """What a token takes in the pages of all layers."""
        layout = self._store.layout
        return layout.kv_format.num_layers * layout.layer_token_bytes

    def write(self, tile: KvTile) -> None:
        """Keep a tile of the prompt."""
        self._store.write(self._table_M, tile)

    def nlls(self, token_ids_T: NDArray[np.int64]) -> Tensor:
        """-ln p of every token of a text but the first, float64 [T - 1]."""
        following_T = torch.from_numpy(token_ids_T[1:])
        pairs = zip(self.logits(token_ids_T[:-1]), following_T.split(MAX_QUERY_TOKENS), strict=True)
        return torch.cat([negative_log_likelihoods(logits_QV, following_Q) for logits_QV, following_Q in pairs])

    def is_answered(self, question_T: NDArray[np.int64], answer_T: NDArray[np.int64]) -> bool:
        """Whether greedy decoding goes on from a question with its answer.

        It does exactly if every token of the answer is the likeliest after those before it, so all are read at once.
        """
        logits_TV = torch.cat(list(self.logits(np.concatenate([question_T, answer_T])[:-1])))
        chosen_T = logits_TV[-len(answer_T) :].argmax(dim=1)
        return torch.equal(chosen_T, torch.from_numpy(answer_T))

    def logits(self, token_ids_T: NDArray[np.int64]) -> Iterator[Tensor]:
        """logits_QV of a text's tokens, some after the others."""
        for start in range(0, len(token_ids_T), MAX_QUERY_TOKENS):
            read = tuple(token_ids_T[start : start + MAX_QUERY_TOKENS].tolist())
            row = PlanRow(read, self._num_tokens + start, self._num_chains, self._table_M, num_logits=len(read))
            yield self._engine.step(StepPlan((row,)))
