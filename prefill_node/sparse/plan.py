"""What a layer's heads attend to, of one prompt, and the index of it for each tile.

Shapes: N tokens of the prompt, T queries of a tile, H query heads, K kv heads, L lists (kv heads or query heads), E
head dim, B key blocks, V verticals, W ranges of distances, X row blocks.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from colm_kernels.sparse_estimate import block_means
from colm_kernels.sparse_index import SparseIndex, Tiling, lower
from colm_kernels.sparse_lines import ListLines, PackedLines
from colm_kernels.sparse_patterns import blocks_at_distances
from torch import Tensor

from prefill_node.sparse.lines import Lines
from prefill_node.sparse.policy import KEY_BLOCK, ROW_BLOCK

_DENSITY_SAMPLES = 32
"""Row blocks, evenly spaced, of which a plan's density is estimated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListPlan:
    """What the query heads of one list attend to, beside their row block's diagonal and block 0."""

    sink_tokens: int
    """First keys."""
    lines: tuple[Lines, ...]
    """Columns and diagonals; the local window is one of the latter."""
    num_blocks: tuple[int, ...] = ()
    """Per query head of the list, how many key blocks each row block chooses by its own queries; () for all zero."""
    is_dense: bool = False
    """Everything, whatever the other fields say."""

    def verticals(self) -> Tensor:
        """Every key column: int64 [V], with repetitions."""
        return torch.cat([lines.verticals_V for lines in self.lines])

    def packed(self) -> ListLines:
        """All lines, as the library wants them."""
        return ListLines(
            self.sink_tokens,
            self.is_dense,
            self.verticals().unique(),
            torch.cat([lines.nearest_W for lines in self.lines]),
            torch.cat([lines.farthest_W for lines in self.lines]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """A layer's lists for one prompt. Keys do not change while it is used."""

    num_tokens: int
    """N."""
    dense_from: int
    """Row blocks that hold this position or a later one attend to everything."""
    lists: tuple[ListPlan, ...]
    """One a kv head; or one a query head."""
    k_means_KBE: Tensor
    """Mean key of every block, fp32; without blocks where no list chooses by them."""
    packed: PackedLines | None = field(init=False)
    """The lists as the library reads them; None where it cannot make their index."""

    def __post_init__(self) -> None:
        is_for_library = self.k_means_KBE.is_cpu and PackedLines.can_lower() and not self.chooses_by_queries
        packed = PackedLines.of([plan.packed() for plan in self.lists]) if is_for_library else None
        object.__setattr__(self, "packed", packed)

    @property
    def chooses_by_queries(self) -> bool:
        """Whether rows are needed to know what they attend to."""
        return any(any(plan.num_blocks) and not plan.is_dense for plan in self.lists)

    def index(self, start: int, q_THE: Tensor) -> SparseIndex:
        """The index of the tile that begins at a position.

        Args:
            start: position of the first query; a multiple of the row block, or other rows share a block.
            q_THE: the tile's rotated queries.

        Raises:
            ValueError: a tile outside the prompt.
        """
        stop = start + len(q_THE)
        if not 0 <= start < stop <= self.num_tokens:
            raise ValueError(f"queries {start} to {stop} are not among the prompt's {self.num_tokens}")
        means_XHE = block_means(q_THE.transpose(0, 1), ROW_BLOCK).transpose(0, 1) if self.chooses_by_queries else None
        return self._index(start, stop, means_XHE)

    def blocks(self, number: int, first_X: Tensor, last_X: Tensor, q_means_XHE: Tensor | None) -> Tensor:
        """Key blocks that one list gives to row blocks anywhere in the prompt.

        Args:
            number: of the list.
            first_X: int64 position of each row block's first query.
            last_X: of its last one.
            q_means_XHE: mean query of each row block, fp32; not looked at unless `chooses_by_queries`.

        Returns:
            mask_XB, bool; the future may be marked too.
        """
        plan, num_key_blocks = self.lists[number], -(-self.num_tokens // KEY_BLOCK)
        block_B = torch.arange(num_key_blocks, device=first_X.device)
        first_X1, last_X1 = first_X.unsqueeze(1), last_X.unsqueeze(1)
        diagonal_XB = (block_B >= first_X1 // KEY_BLOCK) & (block_B <= last_X1 // KEY_BLOCK)
        mask_XB = diagonal_XB | (block_B * KEY_BLOCK < max(1, plan.sink_tokens)) | (last_X1 >= self.dense_from)
        if plan.is_dense:
            return torch.ones_like(mask_XB)
        for lines in plan.lines:
            mask_XB |= blocks_at_distances(
                first_X,
                last_X,
                lines.nearest_W.unsqueeze(0),
                lines.farthest_W.unsqueeze(0),
                num_key_blocks=num_key_blocks,
                key_block=KEY_BLOCK,
            )[0]
        if q_means_XHE is None:
            return mask_XB
        group = q_means_XHE.shape[1] // len(self.lists)
        k_means_BE = self.k_means_KBE[number * len(self.k_means_KBE) // len(self.lists)]
        is_elective_XB = (block_B > 0) & (block_B < first_X1 // KEY_BLOCK)
        for head, num_blocks in enumerate(plan.num_blocks):
            scores_XB = q_means_XHE[:, number * group + head] @ k_means_BE.T
            scores_XB.masked_fill_(~is_elective_XB, float("-inf"))
            best_XN = scores_XB.topk(min(num_blocks, num_key_blocks), dim=1).indices
            mask_XB |= torch.zeros_like(mask_XB).scatter_(1, best_XN, True)
        return mask_XB

    def density(self) -> float:
        """About what share of the causal pairs is listed; blocks chosen by queries are left out."""
        num_row_blocks = -(-self.num_tokens // ROW_BLOCK)
        num_samples = min(_DENSITY_SAMPLES, num_row_blocks)
        starts = [(2 * i + 1) * num_row_blocks // (2 * num_samples) * ROW_BLOCK for i in range(num_samples)]
        indexes = [self._index(start, min(start + ROW_BLOCK, self.num_tokens), None) for start in starts]
        listed = sum(index.num_pairs() for index in indexes)
        return listed / sum(index.num_pairs() / index.density() for index in indexes)

    def with_dense(self, numbers: Collection[int]) -> Self:
        """The same with those lists dense."""
        lists = (replace(plan, is_dense=plan.is_dense or i in numbers) for i, plan in enumerate(self.lists))
        return replace(self, lists=tuple(lists))

    def _index(self, start: int, stop: int, q_means_XHE: Tensor | None) -> SparseIndex:
        tiling = Tiling(num_queries=stop - start, num_keys=stop, row_block=ROW_BLOCK, key_block=KEY_BLOCK)
        if self.packed is not None:
            return self.packed.index(tiling, dense_from=self.dense_from)
        device = self.k_means_KBE.device
        rows = (tiling.first_positions(device), tiling.last_positions(device))
        masks = [
            self.blocks(number, *rows, q_means_XHE)[:, : tiling.num_key_blocks] for number in range(len(self.lists))
        ]
        columns = [plan.verticals() for plan in self.lists]
        columns_LV = torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=-1)
        return lower(tiling, torch.stack(masks), columns_LV.masked_fill(columns_LV >= stop, -1))
