"""Sparse prefill attention: every variant against the definition, within the budget of tolerance.py."""

import threading
from collections.abc import Iterator

import pytest
import torch
from colm_kernels import native, tolerance
from colm_kernels.native import CancelFlag, Cancelled, use_variant
from colm_kernels.prefill_attention import prefill_attention
from colm_kernels.sparse_index import BLOCK_SIZES, SparseIndex, Tiling, lower
from colm_kernels.sparse_prefill_attention import sparse_prefill_attention
from torch import Tensor

from tests.kernel_inputs import prefill_inputs as inputs

pytestmark = pytest.mark.kernels

DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture(params=native.available_variants())
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_variant(request.param):
        yield request.param


def random_index(num_queries, num_keys, num_lists, *, density=0.3, num_columns=40, **blocks) -> SparseIndex:
    generator = torch.Generator().manual_seed(num_queries * 7919 + num_keys)
    tiling = Tiling(num_queries=num_queries, num_keys=num_keys, **blocks)
    mask = torch.rand(num_lists, tiling.num_row_blocks, tiling.num_key_blocks, generator=generator) < density
    columns = torch.randint(-1, num_keys, (num_lists, num_columns), generator=generator)
    return lower(tiling, mask, columns)


def everything(num_queries, num_keys, num_lists, **blocks) -> SparseIndex:
    return random_index(num_queries, num_keys, num_lists, density=1.1, num_columns=0, **blocks)


def assert_matches_definition(q: Tensor, k: Tensor, v: Tensor, index: SparseIndex, **options) -> None:
    tolerance.check_all(
        tolerance.prefill_attention(q, k, v, index), sparse_prefill_attention(q, k, v, index, **options)
    )


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_block", BLOCK_SIZES)
@pytest.mark.parametrize("key_block", BLOCK_SIZES)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 331])
def test_whole_sequence_matches_at_lengths_around_the_blocks(length, row_block, key_block, dtype):
    index = random_index(length, length, 2, row_block=row_block, key_block=key_block)
    assert_matches_definition(*inputs(length, length, 2, 2, 64, dtype), index)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 64, 97, 130])
@pytest.mark.parametrize("num_prefix", [1, 63, 64, 511, 1009])
def test_tile_after_a_prefix_matches(num_queries, num_prefix, dtype):
    num_keys = num_prefix + num_queries
    index = random_index(num_queries, num_keys, 2, num_columns=150)
    assert_matches_definition(*inputs(num_queries, num_keys, 2, 2, 16, dtype), index)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", native.HEAD_DIMS)
def test_every_head_dim_matches(head_dim, dtype):
    assert_matches_definition(*inputs(101, 613, 2, 1, head_dim, dtype), random_index(101, 613, 2))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("lists", ["kv heads", "query heads"])
def test_grouped_queries_read_their_own_kv_head_and_list(group, lists):
    num_lists = 2 if lists == "kv heads" else 2 * group
    index = random_index(150, 300, num_lists)
    assert_matches_definition(*inputs(150, 300, 2 * group, 2, 16, torch.bfloat16), index)


@pytest.mark.usefixtures("variant")
def test_other_head_dims_run_in_pytorch():
    assert_matches_definition(*inputs(70, 133, 4, 2, 24, torch.float32), random_index(70, 133, 2))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("num_columns", [1, 63, 64, 65, 500])
def test_any_number_of_columns_matches(num_columns):
    index = random_index(70, 1100, 1, density=0.0, num_columns=num_columns)
    assert_matches_definition(*inputs(70, 1100, 1, 1, 64, torch.bfloat16), index)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_any_number_of_threads_matches(num_threads):
    index = random_index(700, 900, 2, row_block=64)
    assert_matches_definition(*inputs(700, 900, 2, 2, 16, torch.float32), index, num_threads=num_threads)


def test_an_index_of_everything_is_dense_attention(variant):
    case = inputs(300, 700, 4, 2, 64, torch.float32)
    sparse, dense = sparse_prefill_attention(*case, everything(300, 700, 2)), prefill_attention(*case)
    for result, of_dense, expected in zip(sparse, dense, tolerance.prefill_attention(*case), strict=True):
        expected.check(result)
        if variant != "torch":  # the same kernel over the same keys in the same order
            assert torch.equal(result, of_dense)


@pytest.mark.usefixtures("variant")
def test_lse_tells_what_share_of_the_attention_is_recalled():
    q, k, v = inputs(64, 640, 1, 1, 16, torch.float32)
    index = random_index(64, 640, 1)
    _, lse = sparse_prefill_attention(q, k, v, index)
    (_, sparse), (_, dense) = (tolerance.prefill_attention(q, k, v, listed) for listed in (index, None))
    sparse.check(lse)
    scores = q[:, 0].double() @ k[0].double().T / 4
    future = torch.ones(64, 640, dtype=torch.bool).triu(577)
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=1)
    recalled = (weights * index.mask()[0]).sum(dim=1)
    tolerance.reordered(recalled).check((sparse.exact - dense.exact).exp()[:, 0])
    assert (recalled < 0.99).any()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_listed_is_never_read(value, dtype):
    q, k, v = inputs(200, 900, 2, 1, 64, dtype)
    index = random_index(200, 900, 1)
    expected, expected_lse = sparse_prefill_attention(q, k, v, index)
    listed_S = index.mask().any(dim=(0, 1))
    assert not listed_S.all()
    k[:, ~listed_S], v[:, ~listed_S] = value, value
    out, lse = sparse_prefill_attention(q, k, v, index)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("where", ["column", "block"])
def test_nan_in_a_listed_value_shows_in_the_rows_that_list_it(where):
    q, k, v = inputs(64, 640, 1, 1, 16, torch.float32)
    index = lower(
        Tiling(num_queries=64, num_keys=640),
        torch.tensor([[[False] * 4 + [True] + [False] * 5]]),
        torch.tensor([[100]]),
    )
    v[0, 100 if where == "column" else 300, 5] = float("nan")
    out, _ = sparse_prefill_attention(q, k, v, index)
    assert out[:, 0, 5].isnan().all()
    assert out[:, 0, :5].isfinite().all()


def test_slices_of_longer_buffers_are_read_in_place(variant):
    q, k, v = inputs(70, 300, 4, 2, 64, torch.bfloat16)
    index = random_index(70, 300, 2)
    expected = sparse_prefill_attention(q, k, v, index)
    storage = torch.full((2, 400, 2, 64), float("nan"), dtype=torch.bfloat16)
    storage[0, :300], storage[1, :300] = k.transpose(0, 1), v.transpose(0, 1)
    wide_q = torch.full((70, 8, 64), float("nan"), dtype=torch.bfloat16)
    wide_q[:, 2:6] = q
    k_view, v_view = (storage[i, :300].transpose(0, 1) for i in (0, 1))
    out, lse = sparse_prefill_attention(wide_q[:, 2:6], k_view, v_view, index)
    for result, of_copy, budget in zip((out, lse), expected, tolerance.prefill_attention(q, k, v, index), strict=True):
        budget.check(result)
        if variant != "torch":
            assert torch.equal(result, of_copy)


def test_keys_past_two_to_the_31_elements_are_found(variant):
    """Offsets in 32 bits would read elsewhere: only the pages that hold listed keys are ever touched."""
    num_keys, head_dim = (1 << 21), 1040  # a stride that takes the last keys past 2^31 elements
    storage = torch.empty(num_keys * head_dim, dtype=torch.bfloat16)
    assert storage.numel() > 1 << 31
    k = storage.view(num_keys, head_dim)[None, :, :16]
    listed = [5, 1 << 20, num_keys - 1000]
    generator = torch.Generator().manual_seed(0)
    index = lower(
        Tiling(num_queries=3, num_keys=num_keys),
        torch.zeros(1, 1, num_keys // 64, dtype=torch.bool),
        torch.tensor([listed]),
    )
    keys_X = index.mask()[0].any(dim=0).nonzero()[:, 0]
    small_k = torch.randn(1, len(keys_X), 16, generator=generator).bfloat16()
    q = torch.randn(3, 1, 16, generator=generator).bfloat16()
    k[0, keys_X] = small_k[0]
    out, _ = sparse_prefill_attention(q, k, k, index)
    small = (q, small_k, small_k)  # the listed keys end with the tile: causal alike
    tolerance.prefill_attention(*small)[0].check(out)
    if variant != "torch":  # the same kernel over the same keys in the same order
        assert torch.equal(out, prefill_attention(*small)[0])


@pytest.mark.usefixtures("variant")
def test_a_set_flag_stops_the_call():
    flag = CancelFlag()
    case, index = inputs(300, 300, 2, 1, 16, torch.float32), random_index(300, 300, 1)
    sparse_prefill_attention(*case, index, cancelled=flag)
    flag.set()
    with pytest.raises(Cancelled):
        sparse_prefill_attention(*case, index, cancelled=flag)


@pytest.mark.parametrize("name", [name for name in native.available_variants() if name != "torch"])
def test_a_flag_says_that_a_call_is_wholly_done(name):
    flag = CancelFlag()
    for size in (1, 100, 300):
        with use_variant(name):
            case = inputs(size, size, 2, 1, 16, torch.float32)
            sparse_prefill_attention(*case, random_index(size, size, 1), cancelled=flag)
        assert 1 - 1e-6 < flag.done_share <= 1


@pytest.mark.parametrize("name", [name for name in native.available_variants() if name != "torch"])
def test_a_flag_set_by_another_thread_stops_a_long_call_between_blocks(name):
    flag = CancelFlag()
    num_keys = 32768  # seconds, however busy or fast the machine is
    case, index = inputs(num_keys, num_keys, 4, 4, 64, torch.float32), everything(num_keys, num_keys, 4)
    timer = threading.Timer(0.02, flag.set)
    timer.start()
    with use_variant(name), pytest.raises(Cancelled):
        sparse_prefill_attention(*case, index, num_threads=2, cancelled=flag)
    timer.join()


@pytest.mark.parametrize(
    ("tile", "lists", "message"),
    [
        ((5, 6), 2, "index is of 5 queries and 6 keys"),
        ((4, 7), 2, "index is of 4 queries and 7 keys"),
        ((4, 6), 3, "index has 3 lists"),
    ],
)
def test_an_index_of_another_tile_is_refused(tile, lists, message):
    with pytest.raises(ValueError, match=message):
        sparse_prefill_attention(*inputs(4, 6, 4, 2, 16, torch.float32), random_index(*tile, lists))


def test_arguments_that_do_not_fit_are_refused_by_name():
    q, k, v = inputs(4, 6, 4, 2, 16, torch.float32)
    with pytest.raises(ValueError, match="v_KSD has shape"):
        sparse_prefill_attention(q, k, v[:, :5], random_index(4, 6, 2))
