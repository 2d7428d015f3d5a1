"""The sparse index: what construction refuses, what lowering guarantees, how pairs are counted."""

from dataclasses import replace

import pytest
import torch
from colm_kernels.sparse_index import SparseIndex, Tiling, lower
from hypothesis import given
from hypothesis import strategies as st

from tests.tilings import positions, tilings


@st.composite
def wishes(draw: st.DrawFn) -> tuple[Tiling, torch.Tensor, torch.Tensor]:
    """A tiling, with wanted blocks and columns for one to three lists."""
    tiling, num_lists = draw(tilings()), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    shape = (num_lists, tiling.num_row_blocks, tiling.num_key_blocks)
    blocks = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.7, 1.1]))
    columns = torch.randint(-3, tiling.num_keys, (num_lists, draw(st.integers(0, 80))), generator=generator)
    return tiling, blocks, columns


@given(wishes())
def test_lowering_covers_every_wish_the_sinks_and_the_diagonal(wish):
    tiling, blocks, columns = wish
    mask_LTS = lower(tiling, blocks, columns).mask()
    rows_T = torch.arange(tiling.num_queries) // tiling.row_block
    keys_S = torch.arange(tiling.num_keys)
    wanted_LTS = blocks[:, rows_T][:, :, keys_S // tiling.key_block]
    for wanted_TS, list_columns in zip(wanted_LTS, columns, strict=True):
        wanted_TS[:, list_columns[list_columns >= 0]] = True
        wanted_TS[:, : tiling.key_block] = True
        wanted_TS[torch.arange(tiling.num_queries), positions(tiling)] = True
    wanted_LTS &= keys_S <= positions(tiling).unsqueeze(1)
    assert (mask_LTS | ~wanted_LTS).all()


@given(wishes())
def test_no_list_holds_a_key_twice_and_none_of_the_future(wish):
    tiling, blocks, columns = wish
    index = lower(tiling, blocks, columns)
    last_N = tiling.last_positions()
    for found in range(index.num_lists * tiling.num_row_blocks):
        listed = index.block_ids[index.block_offsets[found] : index.block_offsets[found + 1]]
        single = index.column_ids[index.column_offsets[found] : index.column_offsets[found + 1]]
        keys = (listed.unsqueeze(1) * tiling.key_block + torch.arange(tiling.key_block)).flatten()
        keys = torch.cat((keys, single))
        assert len(keys.unique()) == len(keys)
        last = last_N[found % tiling.num_row_blocks]
        assert (listed * tiling.key_block <= last).all()
        assert (single < last).all()


@given(wishes())
def test_pairs_and_density_are_those_of_the_mask(wish):
    tiling, blocks, columns = wish
    index = lower(tiling, blocks, columns)
    num_pairs = int(index.mask().sum())
    assert index.num_pairs() == num_pairs
    causal = int((torch.arange(tiling.num_keys) <= positions(tiling).unsqueeze(1)).sum())
    assert index.density() == pytest.approx(num_pairs / (index.num_lists * causal))


def test_the_example_of_the_docstring_holds():
    index = SparseIndex(
        tiling=Tiling(num_queries=128, num_keys=384),
        num_lists=1,
        block_offsets=torch.tensor([0, 4]),
        block_ids=torch.tensor([0, 3, 4, 5], dtype=torch.int32),
        column_offsets=torch.tensor([0, 2]),
        column_ids=torch.tensor([70, 130], dtype=torch.int32),
    )
    seen = index.mask()[0, 300 - 256].nonzero()[:, 0].tolist()
    assert seen == [*range(64), 70, 130, *range(192, 301)]


def good_index() -> SparseIndex:
    return lower(
        Tiling(num_queries=200, num_keys=500),
        torch.zeros(2, 2, 8, dtype=torch.bool).index_fill(2, torch.tensor([2]), True),
        torch.tensor([[70, 90], [100, -1]]),
    )


def replaced(field: str, at: int, value: int) -> dict[str, torch.Tensor]:
    tensor = getattr(good_index(), field).clone()
    tensor[at] = value
    return {field: tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_lists": 0}, "num_lists=0"),
        ({"num_lists": 3}, "block_offsets must hold 7 offsets"),
        ({"block_ids": torch.zeros(3)}, "block_ids is torch.float32"),
        ({"column_offsets": torch.zeros(5, dtype=torch.int32)}, "column_offsets is torch.int32"),
        (replaced("block_offsets", 0, 1), "block_offsets must hold"),
        (replaced("block_offsets", 1, 99), "block_offsets must hold"),
        (replaced("block_ids", 0, 1), "block_ids of list 0, row block 0, does not start with block 0"),
        (replaced("block_ids", 1, 0), "block_ids of list 0, row block 0, does not ascend"),
        (replaced("block_ids", 4, 7), "block_ids of list 0, row block 0, does not end with the diagonal"),
        (replaced("block_ids", -1, 8), "block_ids of list 1, row block 1, has an id outside 0 to 7"),
        (replaced("block_ids", -1, -1), "block_ids of list 1, row block 1, has an id outside"),
        (replaced("column_ids", 0, 500), "column_ids of list 0, row block 0, has an id outside 0 to 499"),
        (replaced("column_ids", 0, 90), "column_ids of list 0, row block 0, does not ascend"),
        (replaced("column_ids", 0, 3), "column_ids of list 0, row block 0, has a column inside a listed block"),
        (replaced("column_ids", -1, 499), "column_ids of list 1, row block 1, has a column inside a listed block"),
        (replaced("column_ids", 1, 490), "column_ids of list 0, row block 0, has a column after"),
    ],
)
def test_a_broken_rule_is_refused_by_field_list_and_row_block(change, message):
    with pytest.raises(ValueError, match=message):
        replace(good_index(), **change)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_queries": 0, "num_keys": 5}, "num_queries=0"),
        ({"num_queries": 6, "num_keys": 5}, "num_queries=6"),
        ({"num_queries": 1, "num_keys": 5, "row_block": 48}, "row_block=48"),
        ({"num_queries": 1, "num_keys": 5, "key_block": 32}, "key_block=32"),
    ],
)
def test_a_tiling_that_no_kernel_takes_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Tiling(**fields)


@pytest.mark.parametrize(
    ("blocks", "columns", "message"),
    [
        (torch.zeros(1, 1, 2, dtype=torch.bool), None, "block_mask_LNB"),
        (torch.zeros(1, 1, 1), None, "block_mask_LNB"),
        (torch.zeros(1, 1, 1, dtype=torch.bool), torch.zeros(2, 1, dtype=torch.int64), "columns_LV has shape"),
        (torch.zeros(1, 1, 1, dtype=torch.bool), torch.tensor([[5]]), "columns_LV holds 5"),
    ],
)
def test_wishes_that_do_not_fit_the_tiling_are_refused(blocks, columns, message):
    with pytest.raises(ValueError, match=message):
        lower(Tiling(num_queries=2, num_keys=5), blocks, columns)
