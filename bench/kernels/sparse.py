"""Sparse prefill attention against our own dense attention."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from colm_kernels import tolerance
from colm_kernels.prefill_attention import prefill_attention
from colm_kernels.sparse_index import SparseIndex, Tiling, lower
from colm_kernels.sparse_patterns import vertical_slash
from colm_kernels.sparse_prefill_attention import sparse_prefill_attention

from bench.harness.contest import Contest, timed
from bench.kernels.common import KernelCase
from bench.kernels.prefill import PrefillCase


@dataclass(frozen=True, kw_only=True)
class SparseCase(KernelCase):
    """A tile whose queries attend to a share of the keys."""

    dense: PrefillCase
    pattern: Literal["blocks", "vertical_slash"]
    density: float
    """The density asked for; the record holds the index's own."""

    @property
    def name(self) -> str:
        """The shape in one word."""
        return f"sparse_{self.pattern}_{self.density:g}_of_{self.dense.name}"

    def index(self, seed: int) -> SparseIndex:
        """A random selection, one list a kv head.

        Blocks: key blocks, each taken at random. Vertical-slash: half of the keys as scattered columns, half as
        diagonals in runs of 64, like a head with many of both.
        """
        generator = torch.Generator().manual_seed(seed)
        num_keys, num_lists = self.dense.num_keys, self.dense.num_kv_heads
        tiling = Tiling(num_queries=self.dense.num_queries, num_keys=num_keys)
        if self.pattern == "blocks":
            shape = (num_lists, tiling.num_row_blocks, tiling.num_key_blocks)
            always = lower(tiling, torch.zeros(shape, dtype=torch.bool)).density()
            chance = (self.density - always) / (1 - always)
            return lower(tiling, torch.rand(shape, generator=generator) < chance)
        # Columns inside a listed block count once, and a run of 64 distances asks for 256 keys of a row block.
        num_columns = int(num_keys * self.density * 0.6)
        num_runs = int(num_keys * self.density * 0.6 / 256)
        columns = [torch.randperm(num_keys, generator=generator)[:num_columns] for _ in range(num_lists)]
        starts = [torch.randperm(num_keys // 256, generator=generator)[:num_runs] * 256 for _ in range(num_lists)]
        slashes = (torch.stack(starts).unsqueeze(2) + torch.arange(64)).flatten(1)
        return vertical_slash(tiling, verticals_LV=torch.stack(columns), slashes_LW=slashes)

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """Dense and sparse on the same inputs, compared by time, as dense computes more pairs."""
        index, (q, k, v) = self.index(seed), self.dense.inputs(seed)

        def check() -> None:
            out, lse = sparse_prefill_attention(q, k, v, index)
            # Row blocks are independent, so only the last one is checked, as a tile of its own: the whole is too large.
            last = last_row_block(index)
            tile = q[-last.tiling.num_queries :]
            tolerance.check_all(tolerance.prefill_attention(tile, k, v, last), (out[-len(tile) :], lse[-len(tile) :]))

        gflops, density = self.dense.flops / 1e9, index.density()
        yield Contest(
            check=check,
            contenders={
                "dense": timed(lambda: prefill_attention(q, k, v), gflops=gflops),
                "sparse": timed(lambda: sparse_prefill_attention(q, k, v, index), gflops=gflops * density),
            },
            ours="sparse",
            against=("dense",),
            facts={"density": round(density, 4)},
        )


_SHAPES: tuple[tuple[int, int, Literal["blocks", "vertical_slash"], float], ...] = (
    (32768, 8, "blocks", 0.25),
    (32768, 8, "vertical_slash", 0.25),
    (16384, 32, "blocks", 0.1),
)
SPARSE_CASES = tuple(
    SparseCase(
        dense=PrefillCase(num_queries=num_keys, num_keys=num_keys, num_heads=heads, num_kv_heads=8, head_dim=64),
        pattern=pattern,
        density=density,
    )
    for num_keys, heads, pattern, density in _SHAPES
)


def last_row_block(index: SparseIndex) -> SparseIndex:
    """The lists of the last row block, as the index of a tile of its own."""
    tiling = index.tiling
    row_blocks = torch.arange(index.num_lists) * tiling.num_row_blocks + tiling.num_row_blocks - 1

    def taken(offsets: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lists = [ids[offsets[i] : offsets[i + 1]] for i in row_blocks.tolist()]
        ends = torch.tensor([0, *map(len, lists)]).cumsum(0)
        return ends, torch.cat(lists)

    block_offsets, block_ids = taken(index.block_offsets, index.block_ids)
    column_offsets, column_ids = taken(index.column_offsets, index.column_ids)
    return replace(
        index,
        tiling=replace(tiling, num_queries=(tiling.num_queries - 1) % tiling.row_block + 1),
        block_offsets=block_offsets,
        block_ids=block_ids,
        column_offsets=column_offsets,
        column_ids=column_ids,
    )
