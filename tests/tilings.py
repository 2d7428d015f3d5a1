"""Small tilings of sparse attention for property tests."""

import torch
from colm_kernels.sparse_index import BLOCK_SIZES, Tiling
from hypothesis import strategies as st


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    num_keys = draw(st.integers(1, 700))
    return Tiling(
        num_queries=draw(st.integers(1, num_keys)),
        num_keys=num_keys,
        row_block=draw(st.sampled_from(BLOCK_SIZES)),
        key_block=draw(st.sampled_from(BLOCK_SIZES)),
    )


def positions(tiling: Tiling) -> torch.Tensor:
    """The position of each query."""
    return torch.arange(tiling.num_keys - tiling.num_queries, tiling.num_keys)
