"""Sparse prefill attention in Triton, against the definition, within the budget of tolerance.py."""

import pytest
import torch
from colm_kernels import tolerance
from colm_kernels.gpu.sparse_prefill_attention import sparse_prefill_attention
from colm_kernels.sparse_index import SparseIndex, Tiling, lower
from torch import Tensor

from tests.gpu import TRITON_DTYPES as DTYPES
from tests.kernel_inputs import prefill_inputs as inputs

pytestmark = pytest.mark.usefixtures("where_triton_runs")


def index_of(q: Tensor, k: Tensor, num_lists: int, row_block=64, key_block=64, density=0.4, num_columns=80):
    """Every list its own blocks and columns, at random."""
    tiling = Tiling(num_queries=q.shape[0], num_keys=k.shape[1], row_block=row_block, key_block=key_block)
    generator = torch.Generator().manual_seed(num_lists)
    wanted = torch.rand(num_lists, tiling.num_row_blocks, tiling.num_key_blocks, generator=generator) < density
    columns = torch.randint(0, tiling.num_keys, (num_lists, num_columns), generator=generator)
    return lower(tiling, wanted, columns)


def assert_matches_definition(q: Tensor, k: Tensor, v: Tensor, index: SparseIndex) -> None:
    tolerance.check_all(tolerance.prefill_attention(q, k, v, index), sparse_prefill_attention(q, k, v, index))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_queries", "num_prefix"), [(1, 0), (1, 300), (63, 1), (64, 64), (65, 257), (131, 191)])
def test_lengths_around_the_blocks_match(num_queries, num_prefix, dtype):
    q, k, v = inputs(num_queries, num_prefix + num_queries, 2, 1, 16, dtype)
    assert_matches_definition(q, k, v, index_of(q, k, 1))


@pytest.mark.parametrize("row_block", [64, 128])
@pytest.mark.parametrize("key_block", [64, 128])
def test_every_size_of_block_matches(row_block, key_block):
    q, k, v = inputs(130, 321, 1, 1, 16, torch.float16)
    assert_matches_definition(q, k, v, index_of(q, k, 1, row_block, key_block))


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
def test_every_head_dim_matches(head_dim):
    q, k, v = inputs(65, 200, 1, 1, head_dim, torch.float16)
    assert_matches_definition(q, k, v, index_of(q, k, 1))


@pytest.mark.parametrize("dtype", DTYPES)  # programs of 128 and 64 rows: of 64 x 3, the second has some to spare
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("a_query_head", [False, True])
def test_lists_of_kv_heads_and_of_query_heads_are_told_apart(group, a_query_head, dtype):
    q, k, v = inputs(66, 200, 2 * group, 2, 16, dtype)
    assert_matches_definition(q, k, v, index_of(q, k, 2 * group if a_query_head else 2))


@pytest.mark.parametrize("num_columns", [0, 1, 31, 32, 33, 64, 65])
def test_groups_of_columns_match(num_columns):
    q, k, v = inputs(3, 203, 1, 1, 16, torch.float32)
    tiling = Tiling(num_queries=3, num_keys=203, row_block=64)
    nothing = torch.zeros(1, tiling.num_row_blocks, tiling.num_key_blocks, dtype=torch.bool)
    index = lower(tiling, nothing, torch.arange(64, 64 + num_columns)[None])
    assert len(index.column_ids) == num_columns
    assert_matches_definition(q, k, v, index)


def test_an_index_of_everything_is_dense_attention():
    q, k, v = inputs(70, 200, 2, 1, 16, torch.float32)
    index = index_of(q, k, 1, density=2.0)
    assert index.density() == 1
    tolerance.check_all(tolerance.prefill_attention(q, k, v), sparse_prefill_attention(q, k, v, index))


def test_keys_that_are_not_listed_are_never_read():
    q, k, v = inputs(70, 400, 2, 1, 16, torch.float32)
    index = index_of(q, k, 1)
    expected = sparse_prefill_attention(q, k, v, index)
    unlisted = ~index.mask().any(dim=1)[0]
    assert unlisted.any()
    k[:, unlisted], v[:, unlisted] = float("nan"), float("nan")
    for changed, before in zip(sparse_prefill_attention(q, k, v, index), expected, strict=True):
        assert torch.equal(changed, before)


def test_slices_of_longer_buffers_are_read_in_place():
    q, k, v = inputs(70, 200, 4, 2, 16, torch.float16)
    index = index_of(q, k, 2)
    expected = sparse_prefill_attention(q, k, v, index)
    storage = torch.full((2, 220, 2, 16), float("nan"), dtype=torch.float16)
    storage[0, :200], storage[1, :200] = k.transpose(0, 1), v.transpose(0, 1)
    wide_q = torch.full((70, 8, 16), float("nan"), dtype=torch.float16)
    wide_q[:, 2:6] = q
    views = (storage[i, :200].transpose(0, 1) for i in (0, 1))
    for strided, packed in zip(sparse_prefill_attention(wide_q[:, 2:6], *views, index), expected, strict=True):
        assert torch.equal(strided, packed)
