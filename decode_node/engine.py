"""Computes a decode step: a few tokens of each of several answers, each answer at its own scale.

Shapes: R rows of the plan, R1 = R + 1, T tokens of all rows, Q those that get logits, L layers, B pages, P tokens of a
page, M page table columns, D active model features, K kv heads, G query heads of the active chains per kv head, E head
dim, V vocabulary.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import is_not
from typing import Self

import numpy as np
import torch
from colm_kernels import panels
from colm_kernels.decode_attention import MAX_QUERY_TOKENS, decode_attention
from colm_kernels.decode_step import DecodeStep, StepRows
from colm_kernels.few_rows_linear import MAX_ROWS_OF_PAIRS, library_variant
from colm_kernels.quantised import Quantisation
from colm_kernels.staircase import memory_of
from numpy.typing import NDArray
from torch import Tensor

from colm.checkpoint import Checkpoint
from colm.errors import ConfigError
from colm.kv import require_shared_kv
from colm.model import ChainTransformer
from colm.model.block import Rows
from colm.model.one_call import all_gains, step_layers
from colm.model.rope import Rope
from colm.model.weights import WeightLayout
from decode_node.kv_store import KvStore
from decode_node.plan import PlanRow, StepPlan

logger = logging.getLogger(__name__)


class DecodeEngine:
    """Runs decode steps: all chains' weights over a store of pages, on the store's device.

    Args:
        checkpoint: of a model whose keys and values are all chain 1's.
        store: the pages.
        in_one_call: run all layers in one call of the kernels' library where it can; else, and on GPUs, the model's
            modules run one by one. Both give the same bits.
        weights: how they lie, in the dtype of the pages; None leaves them as stored.
        draft_weights: what a copy of chain 1's is quantised to, for steps of which nothing lasts; None makes none. Nor
            is one made where `weights` are quantised, on a GPU, without the kernels' library, of one chain, or of a
            model that cannot be quantised: chain 1's own then draft.

    Raises:
        ConfigError: the weights cannot be quantised, or not for this device.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        store: KvStore,
        *,
        in_one_call: bool = True,
        weights: WeightLayout | None = None,
        draft_weights: Quantisation | None = None,
    ) -> None:
        require_shared_kv(checkpoint.config)
        self.config = checkpoint.config
        self._store = store
        self._table = _BatchTable(store.device)
        layout = weights or WeightLayout(dtype=store.layout.kv_format.dtype)
        self._is_in_panels = _wants_panels(layout, store.device)
        self._rope = Rope(checkpoint.config, store.device)
        self._all = _Weights.of(_load(checkpoint, layout, store.device), store, in_one_call=in_one_call)
        self._embedding = self._all.model.embedding
        quantised = None if layout.quantisation else draft_weights
        drafting = _load_drafting(checkpoint, layout.dtype, store.device, quantised)
        self._drafting = _Weights.of(drafting, store, in_one_call=in_one_call) if drafting else self._all

    def weight_bytes(self, num_chains: int) -> int:
        """What a step at a scale reads of the matrices."""
        return self._all.num_bytes(num_chains)

    @property
    def draft_share(self) -> float:
        """What a step of drafts reads of the matrices, of what one of chain 1 reads."""
        return self._drafting.num_bytes(1) / self._all.num_bytes(1)

    @property
    def max_exact_tokens(self) -> int:
        """Most tokens of a step in which each gets the bits that it gets alone, as far as `MAX_ROWS_OF_PAIRS`.

        That is the answer, too, where any number of tokens keep their bits, as in panels, and where none do. Beyond it
        PyTorch's products serve weights by rows. Their sums depend on the number of rows, within the same tolerance.
        """
        if self._is_in_panels:
            return MAX_ROWS_OF_PAIRS
        dtype = self._store.layout.kv_format.dtype
        in_library = (num for num in range(MAX_ROWS_OF_PAIRS, 0, -1) if library_variant(num, dtype) != "torch")
        return next(in_library, MAX_ROWS_OF_PAIRS)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> Tensor:
        """Run each row's tokens through the row's chains; keys and values come from chain 1 at every scale.

        Returns:
            logits_QV of the tokens that the plan asks for: row by row, within a row in the order of its tokens.
        """
        num_chains = plan.rows[0].num_chains
        num_tokens_R = [len(row.token_ids) for row in plan.rows]
        assert max(num_tokens_R) <= MAX_QUERY_TOKENS, f"rows of {num_tokens_R} tokens, at most {MAX_QUERY_TOKENS}"
        token_ids_T, positions_T, slot_mapping_T, context_lens_R, cu_seqlens_q_R1 = self._moved(
            [token_id for row in plan.rows for token_id in row.token_ids],
            [row.position + i for row in plan.rows for i in range(len(row.token_ids))],
            [slot for row in plan.rows for slot in self._slots(row)],
            [row.position + len(row.token_ids) for row in plan.rows],
            [0, *accumulate(num_tokens_R)],
        )
        cos_TE, sin_TE = self._rope.tables(positions_T)
        step = StepRows(
            # Larger scales stand first, so chain i runs on a leading run of tokens and its weights are read once.
            chain_rows=_chain_rows(plan, num_tokens_R),
            cos_TE=cos_TE,
            sin_TE=sin_TE,
            slot_mapping_T=slot_mapping_T,
            block_table_RM=self._table.of(plan.rows),
            context_lens_R=context_lens_R.to(torch.int32),
            cu_seqlens_q_R1=cu_seqlens_q_R1.to(torch.int32),
        )
        x_TD = self._embedding.embed(token_ids_T, num_chains)
        weights = self._drafting if plan.only_drafts else self._all
        if weights.one_call is not None and (variant := weights.one_call.variant_for(len(x_TD))) != "torch":
            normed_TD = weights.one_call.run(x_TD, step, variant)
        else:
            normed_TD = self._by_modules(weights.model, x_TD, step)
        return _logits(weights.model, plan, normed_TD)

    def _by_modules(self, model: ChainTransformer, x_TD: Tensor, step: StepRows) -> Tensor:
        """All layers and the final norm."""
        rows, num_chains = Rows(step.chain_rows, step.cos_TE, step.sin_TE), len(step.chain_rows)
        blocks = model.blocks
        next_norms = [*(layer.attention_norm for layer in blocks[1:]), model.final_norm]
        normed_TD: Tensor = blocks[0].attention_norm(x_TD, num_chains)
        for index, (layer, next_norm) in enumerate(zip(blocks, next_norms, strict=True)):
            delta_TD = layer.step(x_TD, normed_TD, rows, _LayerPages(self._store, index, step))
            # Added to x by the norm that reads the sum: one pass over the rows in place of two.
            normed_TD = next_norm.add_(x_TD, delta_TD, num_chains)
        return normed_TD

    def _slots(self, row: PlanRow) -> Iterator[int]:
        """Where a row's tokens are written, in every layer: page * P + slot."""
        page_tokens = self._store.layout.page_tokens
        for position in range(row.position, row.position + len(row.token_ids)):
            yield int(row.table_M[position // page_tokens]) * page_tokens + position % page_tokens

    def _moved(self, *lists: Sequence[int]) -> tuple[Tensor, ...]:
        """Lists of numbers as int64 tensors on the device, moved in one copy."""
        numbers = torch.tensor([number for each in lists for number in each], dtype=torch.int64)
        moved: tuple[Tensor, ...] = numbers.to(self._store.device).split([len(each) for each in lists])
        return moved


@dataclass(frozen=True, slots=True)
class _Weights:
    """A model's, or its first chain's."""

    model: ChainTransformer
    one_call: DecodeStep | None
    """All layers, where the library can run them so."""

    @classmethod
    def of(cls, model: ChainTransformer, store: KvStore, *, in_one_call: bool) -> Self:
        """With the pages that they write and read."""
        if not in_one_call or (layers := step_layers(model, store.device)) is None:
            return cls(model, None)
        pages = store.k_pages_LBPKD, store.v_pages_LBPKD, store.k_scales_LBPK, store.v_scales_LBPK
        chain_heads, eps = model.config.chains[: model.num_chains], model.config.norm_eps
        return cls(model, DecodeStep(layers, all_gains(model.final_norm), chain_heads, *pages, eps=eps))

    def num_bytes(self, num_chains: int) -> int:
        """Of the matrices that a step at a scale reads."""
        modules = self.model.multiplied.values()
        return sum(memory_of(weight).nbytes for module in modules for weight in module.weights(num_chains))


def _logits(model: ChainTransformer, plan: StepPlan, normed_TD: Tensor) -> Tensor:
    num_logits_R = [row.num_logits for row in plan.rows]
    ends_R = accumulate(len(row.token_ids) for row in plan.rows)
    asked_Q = [token for end, count in zip(ends_R, num_logits_R, strict=True) for token in range(end - count, end)]
    if len(asked_Q) < len(normed_TD):
        normed_TD = normed_TD[asked_Q]
    return model.output_table.logits(normed_TD, _chain_rows(plan, num_logits_R))


def _load_drafting(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, quantisation: Quantisation | None
) -> ChainTransformer | None:
    """Chain 1, quantised, with nothing that drafts look up in the whole model; None where it would not pay."""
    can_multiply = device.type == "cpu" and panels.library_variant(dtype) != "torch"
    if quantisation is None or checkpoint.config.num_chains == 1 or not can_multiply:
        return None
    layout = WeightLayout(dtype=dtype, quantisation=quantisation, only_drafts=True)
    try:
        return checkpoint.load_in_panels(layout, 1)
    except ConfigError as err:
        logger.warning("decode.draft_weights as stored: %s", err)
        return None


def _load(checkpoint: Checkpoint, layout: WeightLayout, device: torch.device) -> ChainTransformer:
    if layout.quantisation is not None and device.type != "cpu":
        raise ConfigError(
            f"weights={layout.quantisation!r} is for CPUs, and this node computes on {device}; leave the weights as "
            'stored, or set device = "cpu"'
        )
    if _wants_panels(layout, device):
        return checkpoint.load_in_panels(layout)
    return checkpoint.load(dtype=layout.dtype, device=device)


def _wants_panels(layout: WeightLayout, device: torch.device) -> bool:
    return layout.quantisation is not None or (device.type == "cpu" and panels.pays(layout.dtype))


def _chain_rows(plan: StepPlan, counts_R: Sequence[int]) -> list[int]:
    """For each active chain, how many leading tokens run it; row r counts for counts_R[r] tokens."""
    return [
        sum(count for row, count in zip(plan.rows, counts_R, strict=True) if row.num_chains > chain)
        for chain in range(plan.rows[0].num_chains)
    ]


@dataclass(frozen=True, slots=True)
class _LayerPages:
    """One layer's pages: the cache that a block writes and reads in a step."""

    store: KvStore
    layer: int
    step: StepRows

    def write(self, k_TKE: Tensor, v_TKE: Tensor, rows: Rows) -> None:
        self.store.write_tokens(self.layer, self.step.slot_mapping_T, k_TKE, v_TKE, rows.cos_RE, rows.sin_RE)

    def attend(self, q_TKGE: Tensor) -> Tensor:
        k_scales_LBPK, v_scales_LBPK = self.store.k_scales_LBPK, self.store.v_scales_LBPK
        return decode_attention(
            q_TKGE,
            self.store.k_pages_LBPKD[self.layer],
            self.store.v_pages_LBPKD[self.layer],
            self.step.block_table_RM,
            self.step.context_lens_R,
            cu_seqlens_q_R1=self.step.cu_seqlens_q_R1,
            k_scales_BPK=None if k_scales_LBPK is None else k_scales_LBPK[self.layer],
            v_scales_BPK=None if v_scales_LBPK is None else v_scales_LBPK[self.layer],
        )


class _BatchTable:
    """Keeps the page tables of a batch on the device; copies them again only where a row has another request.

    A row of a million tokens has thousands of pages. Copying them would show in steps of milliseconds.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: list[NDArray[np.int32]] = []
        self._table_RM = torch.empty(0, 0, dtype=torch.int32, device=device)

    def of(self, rows: Sequence[PlanRow]) -> Tensor:
        """The rows' tables as table_RM, int32; short rows are padded with page 0, which is not read there."""
        tables = [row.table_M for row in rows]
        if len(tables) != len(self._tables) or any(map(is_not, tables, self._tables)):
            table_RM = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
            for row_M, table_M in zip(table_RM, tables, strict=True):
                row_M[: len(table_M)] = table_M
            self._table_RM = torch.from_numpy(table_RM).to(self._device)
            self._tables = tables
        return self._table_RM
