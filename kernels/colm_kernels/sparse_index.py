"""Which keys a tile of queries attends to: the one format that every sparse pattern lowers to.

Shapes: T queries of the tile, S keys (prefix and tile), L lists a row block (one a kv head, or one a query head), N row
blocks, B key blocks, V candidate columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SIZES = (64, 128)
"""Rows and keys that a block may have, as the kernels' tiles allow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """How the queries of a tile and the keys up to its end are cut into blocks.

    Row block n is queries [n * row_block, (n + 1) * row_block) of the tile, key block b keys [b * key_block,
    (b + 1) * key_block); the last of each may be shorter. Query t stands at position S - T + t.
    """

    num_queries: int
    num_keys: int
    row_block: int = 128
    """Smaller follows a pattern more closely, larger packs its keys for more queries."""
    key_block: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.num_queries <= self.num_keys:
            raise ValueError(f"num_queries={self.num_queries} must be between 1 and num_keys={self.num_keys}")
        for name in ("row_block", "key_block"):
            if getattr(self, name) not in BLOCK_SIZES:
                raise ValueError(f"{name}={getattr(self, name)} must be one of {BLOCK_SIZES}")

    @property
    def num_row_blocks(self) -> int:
        """N."""
        return -(-self.num_queries // self.row_block)

    @property
    def num_key_blocks(self) -> int:
        """B."""
        return -(-self.num_keys // self.key_block)

    def first_positions(self, device: torch.device | None = None) -> Tensor:
        """Position of each row block's first query: int64 [N]."""
        starts_N = torch.arange(0, self.num_queries, self.row_block, device=device)
        return starts_N + (self.num_keys - self.num_queries)

    def last_positions(self, device: torch.device | None = None) -> Tensor:
        """Position of each row block's last query: int64 [N]."""
        return (self.first_positions(device) + (self.row_block - 1)).clamp_max(self.num_keys - 1)

    def diagonal(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """First and last key block that holds a position of each row block: int64 [N] each."""
        return self.first_positions(device) // self.key_block, self.last_positions(device) // self.key_block


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseIndex:
    """Per list and row block the key blocks and the key columns that its queries attend to.

    List l of row block n is entries [offsets[l * N + n], offsets[l * N + n + 1]) of its ids. A query attends to the
    listed keys at or before its own position. Every list obeys, and construction checks:

    - block ids ascend strictly; the first is 0, where the attention sinks are; the last ones are the diagonal blocks,
      so every query sees itself;
    - column ids (key positions) ascend strictly and lie before the diagonal blocks and in no listed block, so no key
      counts twice and only diagonal blocks need a causal mask.

    Example: key_block=64, a row block of queries at positions 256-383, blocks [0, 3, 4, 5], columns [70, 130]: the
    query at 300 attends to keys 0-63, 70, 130 and 192-300.

    Raises:
        ValueError: a rule is broken; names the field, the list and the row block.
    """

    tiling: Tiling
    num_lists: int
    """L."""
    block_offsets: Tensor
    """int64 [L * N + 1]."""
    block_ids: Tensor
    """int32."""
    column_offsets: Tensor
    """int64 [L * N + 1]."""
    column_ids: Tensor
    """int32."""
    is_checked: bool = False
    """The rules are known to be kept; checking them takes ten times as long as making the lists."""

    def __post_init__(self) -> None:
        if self.is_checked:
            return
        if self.num_lists < 1:
            raise ValueError(f"num_lists={self.num_lists} must be at least 1")
        blocks_E, block_of_E = self._check_ascending("block", self.tiling.num_key_blocks)
        columns_C, column_of_C = self._check_ascending("column", self.tiling.num_keys)
        first_N, last_N = self.tiling.diagonal(self.device)
        first_M, last_M = first_N.repeat(self.num_lists), last_N.repeat(self.num_lists)
        starts_M, ends_M = self.block_offsets[:-1], self.block_offsets[1:]
        diagonal_starts_M = ends_M - (last_M - first_M + 1)
        self._refuse(diagonal_starts_M < starts_M, "block_ids", "lacks diagonal blocks")
        # Ids ascend strictly, so the right first id, last id and count imply the right ids between.
        is_diagonal_M = (blocks_E[diagonal_starts_M] == first_M) & (blocks_E[ends_M - 1] == last_M)
        self._refuse(~is_diagonal_M, "block_ids", "does not end with the diagonal blocks")
        self._refuse(blocks_E[starts_M] != 0, "block_ids", "does not start with block 0")
        keyed_E = block_of_E * self.tiling.num_key_blocks + blocks_E
        keyed_C = column_of_C * self.tiling.num_key_blocks + columns_C // self.tiling.key_block
        covered_C = keyed_E[torch.searchsorted(keyed_E, keyed_C).clamp_max(len(keyed_E) - 1)] == keyed_C
        self._refuse(covered_C, "column_ids", "has a column inside a listed block", column_of_C)
        self._refuse(
            columns_C >= first_M[column_of_C] * self.tiling.key_block,
            "column_ids",
            "has a column after the row block's first query",
            column_of_C,
        )

    @property
    def device(self) -> torch.device:
        """The device of the ids."""
        return self.block_ids.device

    def _check_ascending(self, kind: str, limit: int) -> tuple[Tensor, Tensor]:
        offsets, ids = getattr(self, f"{kind}_offsets"), getattr(self, f"{kind}_ids")
        num_lists = self.num_lists * self.tiling.num_row_blocks
        for name, tensor, dtype in ((f"{kind}_offsets", offsets, torch.int64), (f"{kind}_ids", ids, torch.int32)):
            if tensor.dtype != dtype or tensor.dim() != 1 or not tensor.is_contiguous() or tensor.device != self.device:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected contiguous 1-D {dtype}")
        counts_M = offsets.diff()
        if len(counts_M) != num_lists or offsets[0] != 0 or offsets[-1] != len(ids) or bool((counts_M < 0).any()):
            raise ValueError(
                f"{kind}_offsets must hold {num_lists + 1} offsets that never decrease, from 0 to the {len(ids)} ids"
            )
        list_of = torch.repeat_interleave(torch.arange(num_lists, device=self.device), counts_M)
        ids = ids.long()
        self._refuse((ids < 0) | (ids >= limit), f"{kind}_ids", f"has an id outside 0 to {limit - 1}", list_of)
        falls = (ids[1:] <= ids[:-1]) & (list_of[1:] == list_of[:-1])
        self._refuse(falls, f"{kind}_ids", "does not ascend strictly", list_of[1:])
        return ids, list_of

    def _refuse(self, bad: Tensor, field: str, what: str, list_of: Tensor | None = None) -> None:
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            found = at if list_of is None else int(list_of[at])
            index, row_block = divmod(found, self.tiling.num_row_blocks)
            raise ValueError(f"{field} of list {index}, row block {row_block}, {what}")

    def num_pairs(self) -> int:
        """(query, key) pairs attended to, over all lists."""
        tiling = self.tiling
        num_lists = self.num_lists * tiling.num_row_blocks
        list_of_E = torch.repeat_interleave(torch.arange(num_lists, device=self.device), self.block_offsets.diff())
        first_E, last_E = (
            positions.repeat(self.num_lists)[list_of_E]
            for positions in (tiling.first_positions(self.device), tiling.last_positions(self.device))
        )
        starts_E = self.block_ids.long() * tiling.key_block

        def up_to(rows_E: Tensor) -> Tensor:
            # Pairs of a block with the first `rows` queries at or after its start: 1, 2, .. key_block, key_block, ..
            rows_E = rows_E.clamp_min(0)
            growing_E = rows_E.clamp_max(tiling.key_block)
            return growing_E * (growing_E + 1) // 2 + (rows_E - growing_E) * tiling.key_block

        in_blocks = (up_to(last_E - starts_E + 1) - up_to(first_E - starts_E)).sum()
        rows_N = tiling.last_positions(self.device) - tiling.first_positions(self.device) + 1
        in_columns = (rows_N.repeat(self.num_lists) * self.column_offsets.diff()).sum()
        return int(in_blocks + in_columns)

    def density(self) -> float:
        """Share of the causal pairs that is attended to."""
        tiling = self.tiling
        prefix = tiling.num_keys - tiling.num_queries
        causal = tiling.num_queries * prefix + tiling.num_queries * (tiling.num_queries + 1) // 2
        return self.num_pairs() / (self.num_lists * causal)

    def mask(self) -> Tensor:
        """Which query attends to which key: bool [L, T, S], for references and pictures."""
        tiling = self.tiling
        mask_LTS = torch.zeros(self.num_lists, tiling.num_queries, tiling.num_keys, dtype=torch.bool)
        for found in range(self.num_lists * tiling.num_row_blocks):
            index, row_block = divmod(found, tiling.num_row_blocks)
            rows = mask_LTS[index, row_block * tiling.row_block : (row_block + 1) * tiling.row_block]
            for block in self.block_ids[self.block_offsets[found] : self.block_offsets[found + 1]].tolist():
                rows[:, block * tiling.key_block : (block + 1) * tiling.key_block] = True
            rows[:, self.column_ids[self.column_offsets[found] : self.column_offsets[found + 1]].long()] = True
        return mask_LTS.tril_(tiling.num_keys - tiling.num_queries)


def lower(tiling: Tiling, block_mask_LNB: Tensor, columns_LV: Tensor | None = None) -> SparseIndex:
    """Build an index from wanted key blocks and columns.

    Block 0 and the diagonal blocks are added. Blocks and columns of the future, and columns inside a listed block, are
    dropped.

    Args:
        tiling: N, B and the positions.
        block_mask_LNB: bool, key blocks wanted by list and row block.
        columns_LV: int64 key positions wanted by every row block of a list, in any order, with repetitions; negative
            ones are padding. Each row block takes those before its diagonal blocks.

    Raises:
        ValueError: shapes that do not fit the tiling, or a column past the last key.
    """
    num_lists = len(block_mask_LNB)
    expected = (num_lists, tiling.num_row_blocks, tiling.num_key_blocks)
    if block_mask_LNB.dim() != 3 or tuple(block_mask_LNB.shape) != expected or block_mask_LNB.dtype != torch.bool:
        raise ValueError(
            f"block_mask_LNB is {block_mask_LNB.dtype} {tuple(block_mask_LNB.shape)}, expected bool "
            f"(*, {tiling.num_row_blocks}, {tiling.num_key_blocks})"
        )
    device = block_mask_LNB.device
    first_N1, last_N1 = (bound_N.unsqueeze(1) for bound_N in tiling.diagonal(device))
    block_B = torch.arange(tiling.num_key_blocks, device=device)
    always_NB = (block_B == 0) | ((block_B >= first_N1) & (block_B <= last_N1))
    listed_LNB = (block_mask_LNB | always_NB) & (block_B <= last_N1)
    if columns_LV is None:
        columns_LV = torch.full((num_lists, 0), -1, device=device)
    if columns_LV.dim() != 2 or len(columns_LV) != num_lists:
        raise ValueError(f"columns_LV has shape {tuple(columns_LV.shape)}, expected ({num_lists}, *)")
    if columns_LV.numel() and int(columns_LV.max()) >= tiling.num_keys:
        raise ValueError(f"columns_LV holds {int(columns_LV.max())}, past the last of {tiling.num_keys} keys")
    columns_LV = columns_LV.sort(dim=1).values
    repeated_LV = torch.zeros_like(columns_LV, dtype=torch.bool)
    repeated_LV[:, 1:] = columns_LV[:, 1:] == columns_LV[:, :-1]
    blocks_LV = columns_LV.clamp_min(0) // tiling.key_block
    is_covered_LNV = listed_LNB.gather(2, blocks_LV.unsqueeze(1).expand(-1, tiling.num_row_blocks, -1))
    wanted_LNV = ~is_covered_LNV & (blocks_LV.unsqueeze(1) < first_N1) & (~repeated_LV & (columns_LV >= 0)).unsqueeze(1)
    columns_LNV = columns_LV.unsqueeze(1).expand_as(wanted_LNV)
    return SparseIndex(
        tiling=tiling,
        num_lists=num_lists,
        block_offsets=_offsets(listed_LNB),
        block_ids=block_B.to(torch.int32).expand_as(listed_LNB)[listed_LNB],
        column_offsets=_offsets(wanted_LNV),
        column_ids=columns_LNV[wanted_LNV].to(torch.int32),
    )


def _offsets(listed_LNX: Tensor) -> Tensor:
    counts_M = listed_LNX.sum(dim=2).flatten()
    return torch.cat((counts_M.new_zeros(1), counts_M.cumsum(0)))
