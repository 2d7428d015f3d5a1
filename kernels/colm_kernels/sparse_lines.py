"""Key columns and ranges of distances of some lists, and the index of them for any tile.

Shapes: L lists, V columns and W ranges of all lists together.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from colm_kernels.native import available_variants, call
from colm_kernels.sparse_index import SparseIndex, Tiling


class LowerArgs(ctypes.Structure):
    """`LowerArgs` of abi.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("num_queries", "num_keys", "row_block", "key_block", "num_lists", "dense_from")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in ("sink_tokens", "is_dense", "range_offsets", "nearest", "farthest", "column_offsets_in")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in ("columns_in", "block_offsets", "block_ids", "column_offsets", "column_ids")
        ),
    )


@dataclass(frozen=True, slots=True)
class ListLines:
    """What every row of one list attends to, beside its row block's diagonal and block 0."""

    sink_tokens: int
    """First keys."""
    is_dense: bool
    """Everything, whatever the other fields say."""
    columns_V: Tensor
    """int64 key positions, ascending strictly."""
    nearest_W: Tensor
    """int64; range w is the distances from nearest to farthest."""
    farthest_W: Tensor


@dataclass(frozen=True, slots=True)
class PackedLines:
    """The lines of some lists in one piece, on the CPU, as the library reads them; all int64."""

    sink_tokens_L: Tensor
    is_dense_L: Tensor
    range_offsets: Tensor
    nearest_W: Tensor
    farthest_W: Tensor
    column_offsets: Tensor
    columns_V: Tensor

    @classmethod
    def of(cls, lists: Sequence[ListLines]) -> Self:
        """Of one line a list."""
        return cls(
            sink_tokens_L=torch.tensor([lines.sink_tokens for lines in lists]),
            is_dense_L=torch.tensor([int(lines.is_dense) for lines in lists]),
            range_offsets=_offsets([len(lines.nearest_W) for lines in lists]),
            nearest_W=torch.cat([lines.nearest_W for lines in lists]),
            farthest_W=torch.cat([lines.farthest_W for lines in lists]),
            column_offsets=_offsets([len(lines.columns_V) for lines in lists]),
            columns_V=torch.cat([lines.columns_V for lines in lists]),
        )

    @staticmethod
    def can_lower() -> bool:
        """Whether there is a library to make the index with."""
        return available_variants() != ("torch",)

    def index(self, tiling: Tiling, *, dense_from: int) -> SparseIndex:
        """The index of a tile, as `lower` makes it of the same blocks and columns.

        Args:
            tiling: of the tile.
            dense_from: row blocks that hold this position or a later one attend to everything.
        """
        num_lists, num_row_blocks = len(self.sink_tokens_L), tiling.num_row_blocks
        offsets = [torch.empty(num_lists * num_row_blocks + 1, dtype=torch.int64) for _ in range(2)]
        blocks = torch.empty(num_lists * num_row_blocks * tiling.num_key_blocks, dtype=torch.int32)
        columns = torch.empty(len(self.columns_V) * num_row_blocks, dtype=torch.int32)
        args = LowerArgs(
            num_queries=tiling.num_queries,
            num_keys=tiling.num_keys,
            row_block=tiling.row_block,
            key_block=tiling.key_block,
            num_lists=num_lists,
            dense_from=dense_from,
            sink_tokens=self.sink_tokens_L.data_ptr(),
            is_dense=self.is_dense_L.data_ptr(),
            range_offsets=self.range_offsets.data_ptr(),
            nearest=self.nearest_W.data_ptr(),
            farthest=self.farthest_W.data_ptr(),
            column_offsets_in=self.column_offsets.data_ptr(),
            columns_in=self.columns_V.data_ptr(),
            block_offsets=offsets[0].data_ptr(),
            block_ids=blocks.data_ptr(),
            column_offsets=offsets[1].data_ptr(),
            column_ids=columns.data_ptr(),
        )
        call("colm_lower", args, available_variants()[-1], 1)
        return SparseIndex(
            tiling=tiling,
            num_lists=num_lists,
            block_offsets=offsets[0],
            block_ids=blocks[: offsets[0][-1]],
            column_offsets=offsets[1],
            column_ids=columns[: offsets[1][-1]],
            is_checked=True,
        )


def _offsets(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)
