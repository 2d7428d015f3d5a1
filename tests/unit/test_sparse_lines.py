"""The index that the library makes of lines, against the one that masks of blocks are lowered to."""

import torch
from colm_kernels.sparse_index import SparseIndex, Tiling, lower
from colm_kernels.sparse_lines import ListLines, PackedLines
from colm_kernels.sparse_patterns import blocks_at_distances
from hypothesis import given
from hypothesis import strategies as st

from tests.library import needs_library
from tests.tilings import tilings

pytestmark = needs_library


def list_of(draw: st.DrawFn, tiling: Tiling) -> ListLines:
    position = st.integers(0, tiling.num_keys - 1)
    ranges = draw(st.lists(st.tuples(position, st.integers(0, 200)), max_size=5))
    nearest_W = torch.tensor([nearest for nearest, _ in ranges], dtype=torch.int64)
    return ListLines(
        draw(st.integers(0, tiling.num_keys)),
        draw(st.integers(0, 4)) == 0,
        torch.tensor(sorted(draw(st.sets(position, max_size=20))), dtype=torch.int64),
        nearest_W,
        nearest_W + torch.tensor([width for _, width in ranges], dtype=torch.int64),
    )


def by_masks(tiling: Tiling, lists: list[ListLines], dense_from: int) -> SparseIndex:
    masks, first_N, last_N = [], tiling.first_positions(), tiling.last_positions()
    block_B = torch.arange(tiling.num_key_blocks)
    for each in lists:
        mask_NB = blocks_at_distances(
            first_N,
            last_N,
            each.nearest_W.unsqueeze(0),
            each.farthest_W.unsqueeze(0),
            num_key_blocks=tiling.num_key_blocks,
            key_block=tiling.key_block,
        )[0]
        mask_NB |= (block_B * tiling.key_block < each.sink_tokens) | (last_N.unsqueeze(1) >= dense_from)
        masks.append(torch.ones_like(mask_NB) if each.is_dense else mask_NB)
    columns_LV = torch.nn.utils.rnn.pad_sequence([each.columns_V for each in lists], batch_first=True, padding_value=-1)
    return lower(tiling, torch.stack(masks), columns_LV)


@given(st.data())
def test_lines_are_lowered_as_masks_are(data: st.DataObject) -> None:
    tiling = data.draw(tilings())
    lists = [list_of(data.draw, tiling) for _ in range(data.draw(st.integers(1, 3)))]
    dense_from = data.draw(st.integers(0, tiling.num_keys))
    found = PackedLines.of(lists).index(tiling, dense_from=dense_from)
    expected = by_masks(tiling, lists, dense_from)
    for name in ("block_offsets", "block_ids", "column_offsets", "column_ids"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    SparseIndex(  # and the rules are kept
        tiling=tiling,
        num_lists=len(lists),
        block_offsets=found.block_offsets,
        block_ids=found.block_ids,
        column_offsets=found.column_offsets,
        column_ids=found.column_ids,
    )
