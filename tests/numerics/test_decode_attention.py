"""Paged decode attention: every variant against the definition, within the budget of tolerance.py."""

import threading
from collections.abc import Iterator

import pytest
import torch
from colm_kernels import native, tolerance
from colm_kernels.decode_attention import decode_attention, decode_attention_reference
from colm_kernels.native import use_variant
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.kernels

TOKEN_BLOCK = 32  # decode.h
DTYPES = (torch.bfloat16, torch.float32)
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(params=native.available_variants())
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_variant(request.param):
        yield request.param


def inputs(context_lens, num_kv_heads, group, head_dim, dtype, page_tokens=16) -> Arguments:
    """Pages in random order, NaN wherever no context reaches, -1 in the table past each context."""
    generator = torch.Generator().manual_seed(sum(context_lens) + group)
    num_pages_R = [-(-length // page_tokens) for length in context_lens]
    num_pages = sum(num_pages_R) + 3
    order = torch.randperm(num_pages, generator=generator).to(torch.int32)
    block_table = torch.full((len(context_lens), max(num_pages_R) + 1), -1, dtype=torch.int32)
    pages = torch.full((2, num_pages, page_tokens, num_kv_heads, head_dim), float("nan"), dtype=dtype)
    used = 0
    for request, (length, count) in enumerate(zip(context_lens, num_pages_R, strict=True)):
        ids = order[used : used + count]
        used += count
        block_table[request, :count] = ids
        filled = torch.full((2, count * page_tokens, num_kv_heads, head_dim), float("nan"), dtype=dtype)
        filled[:, :length] = torch.randn(2, length, num_kv_heads, head_dim, generator=generator).to(dtype)
        pages[:, ids.long()] = filled.unflatten(1, (count, page_tokens))
    q = torch.randn(len(context_lens), num_kv_heads, group, head_dim, generator=generator).to(dtype)
    return q, pages[0], pages[1], block_table, torch.tensor(context_lens, dtype=torch.int32)


def eager(q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, context_lens: Tensor) -> Tensor:
    """SDPA in the inputs' own dtype."""
    page_tokens = k_pages.shape[1]
    out = torch.empty_like(q)
    for request, length in enumerate(context_lens.tolist()):
        ids = block_table[request, : -(-length // page_tokens)].long()
        k, v = (pages[ids].flatten(0, 1)[:length].transpose(0, 1) for pages in (k_pages, v_pages))
        out[request] = F.scaled_dot_product_attention(q[request][None], k[None], v[None])[0]
    return out


def assert_matches_definition(arguments: Arguments, **options) -> None:
    out = decode_attention(*arguments, **options)
    q, k_pages, v_pages, *table = arguments
    reference = decode_attention_reference(q.double(), k_pages.double(), v_pages.double(), *table)
    magnitude = decode_attention_reference(q.double(), k_pages.double(), v_pages.double().abs(), *table)
    tolerance.assert_attention_within_budget(out, eager(*arguments), reference, magnitude)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 61, 255, 256, 257, 1009])
def test_lengths_around_pages_and_blocks_match(length, dtype):
    assert_matches_definition(inputs([length], 2, 2, 64, dtype))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", native.HEAD_DIMS)
def test_every_head_dim_matches(head_dim, dtype):
    assert_matches_definition(inputs([77, 130], 2, 3, head_dim, dtype))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 17])
def test_every_number_of_query_heads_matches(group, dtype):
    assert_matches_definition(inputs([50], 3, group, 64, dtype))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("page_tokens", [1, 3, 16, 64, 100])
def test_every_page_size_matches(page_tokens):
    assert_matches_definition(inputs([1, 200, 99], 2, 2, 16, torch.bfloat16, page_tokens))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_contexts_split_over_threads_match(num_threads):
    # Long enough for the launcher to use every thread and to split, with short requests beside.
    arguments = inputs([9001, 1, 40, 3000], 2, 2, 64, torch.bfloat16)
    assert_matches_definition(arguments, num_threads=num_threads)


@pytest.mark.usefixtures("variant")
def test_other_head_dims_run_in_pytorch():
    assert_matches_definition(inputs([40, 3], 2, 2, 24, torch.float32))


@pytest.mark.usefixtures("variant")
def test_no_requests_give_an_empty_result():
    arguments = inputs([5], 2, 2, 16, torch.float32)
    q, k_pages, v_pages, block_table, context_lens = arguments
    assert decode_attention(q[:0], k_pages, v_pages, block_table[:0], context_lens[:0]).shape == (0, 2, 2, 16)


@pytest.mark.usefixtures("variant")
def test_non_contiguous_queries_and_tables_are_handled():
    q, k_pages, v_pages, block_table, context_lens = inputs([40, 70], 2, 2, 16, torch.float32)
    expected = decode_attention(q, k_pages, v_pages, block_table, context_lens)
    wide_table = torch.full((2, 40), -1, dtype=torch.int32)
    wide_table[:, : block_table.shape[1]] = block_table
    strided_q = q.transpose(1, 2).contiguous().transpose(1, 2)
    out = decode_attention(
        strided_q, k_pages, v_pages, wide_table[:, : block_table.shape[1]], context_lens.repeat(2).view(2, 2)[0]
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_request_and_column(value):
    q, k_pages, v_pages, block_table, context_lens = inputs([100, 90], 1, 2, 16, torch.float32)
    v_pages[block_table[0, 1], 3, 0, 7] = value
    out = decode_attention(q, k_pages, v_pages, block_table, context_lens)
    assert not out[0, 0, :, 7].isfinite().any()
    assert out[0, 0, :, :7].isfinite().all()
    assert out[1].isfinite().all()
    k_pages[block_table[0, 1], 3, 0, 7] = value
    out = decode_attention(q, k_pages, v_pages, block_table, context_lens)
    assert out[1].isfinite().all()


@pytest.mark.usefixtures("variant")
def test_pages_past_two_to_the_31_elements_are_read():
    head_dim, page_tokens = 128, 64
    num_pages = 2**31 // (head_dim * page_tokens) + 8
    # 4 GiB of addresses each, never written but for the pages used: the rest takes no memory.
    k_pages, v_pages = (torch.empty(num_pages, page_tokens, 1, head_dim, dtype=torch.bfloat16) for _ in "kv")
    small = inputs([100], 1, 2, head_dim, torch.bfloat16, page_tokens)
    q, small_k, small_v, small_table, context_lens = small
    block_table = torch.tensor([[num_pages - 1, num_pages - 3]], dtype=torch.int32)
    for column in (0, 1):
        k_pages[block_table[0, column]] = small_k[small_table[0, column]]
        v_pages[block_table[0, column]] = small_v[small_table[0, column]]
    out = decode_attention(q, k_pages, v_pages, block_table, context_lens)
    assert torch.equal(out, decode_attention(*small))


def test_python_threads_may_call_at_once(variant):
    cases = [inputs([3000 + i, 50], 2, 2, 64, torch.float32) for i in range(3)]
    expected = [decode_attention(*case) for case in cases]
    results: dict[int, list[Tensor]] = {}

    def work(i: int) -> None:
        with use_variant(variant):
            results[i] = [decode_attention(*cases[i], num_threads=1 + n % 3) for n in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, outs in results.items():
        for out in outs:
            torch.testing.assert_close(out, expected[i], rtol=1e-5, atol=1e-6)
    assert len(results) == 3


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t[0], "q_RKGD has shape"),
        (1, lambda t: t[..., :8], "k_pages_BPKD has shape"),
        (2, lambda t: t[:1], "v_pages_BPKD has shape"),
        (2, lambda t: t.bfloat16(), "v_pages_BPKD=torch.bfloat16"),
        (1, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "k_pages_BPKD has strides"),
        (3, lambda t: t[:1], "block_table_RM has shape"),
        (3, lambda t: t.long(), "block_table_RM has dtype"),
        (3, lambda t: t + 1000, "block_table_RM has page ids"),
        (3, lambda t: t - 1000, "block_table_RM has page ids"),
        (4, lambda t: t[:1], "context_lens_R has shape"),
        (4, lambda t: t.long(), "context_lens_R has dtype"),
        (4, lambda t: t * 0, "context_lens_R spans 0"),
        (4, lambda t: t + 1000, "context_lens_R spans"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(index, change, message):
    arguments = list(inputs([20, 70], 2, 2, 16, torch.float32))
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match=message):
        decode_attention(*arguments)
