"""Paged decode attention: every variant against the definition, within the budget of tolerance.py."""

import threading
from collections.abc import Iterator

import pytest
import torch
from colm_kernels import native, tolerance
from colm_kernels.decode_attention import decode_attention, decode_attention_reference
from colm_kernels.native import use_variant
from torch import Tensor

from tests.library import VARIANTS

pytestmark = pytest.mark.kernels

TOKEN_BLOCK, SPAN, LONGER_SPANS = 64, 128, 2048  # decode.h, decode.cpp: of SPAN tokens before LONGER_SPANS
DTYPES = (torch.bfloat16, torch.float32)
FORMATS = ((torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.int8), (torch.float32, torch.int8))
"""Of queries and of pages."""
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Options = dict[str, Tensor]


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


def query_tokens(arguments: Arguments, num_queries) -> tuple[Arguments, Options]:
    """`inputs` with several query tokens a request."""
    q, *pages = arguments
    generator = torch.Generator().manual_seed(sum(num_queries))
    q = torch.randn(sum(num_queries), *q.shape[1:], generator=generator).to(q.dtype)
    bounds = torch.tensor([0, *num_queries]).cumsum(0).to(torch.int32)
    return (q, *pages), {"cu_seqlens_q_R1": bounds}


def quantised(arguments: Arguments) -> tuple[Arguments, Options]:
    """`inputs` with int8 pages, whose scales are NaN wherever no context reaches."""
    q, k_pages, v_pages, *table = arguments
    scales = [(pages.float().abs().amax(-1) / 120).bfloat16() for pages in (k_pages, v_pages)]
    k_pages, v_pages = (
        (pages.float() / scale.float().unsqueeze(-1)).round().nan_to_num(nan=111).to(torch.int8)
        for pages, scale in zip((k_pages, v_pages), scales, strict=True)
    )
    return (q, k_pages, v_pages, *table), {"k_scales_BPK": scales[0], "v_scales_BPK": scales[1]}


def case(context_lens, num_queries, num_kv_heads, group, head_dim, q_dtype, page_dtype) -> tuple[Arguments, Options]:
    arguments = inputs(context_lens, num_kv_heads, group, head_dim, q_dtype)
    arguments, options = query_tokens(arguments, num_queries)
    if page_dtype == torch.int8:
        arguments, scales = quantised(arguments)
        options |= scales
    return arguments, options


def assert_matches_definition(arguments: Arguments, options: Options | None = None, **more) -> None:
    options = options or {}
    tolerance.decode_attention(*arguments, **options).check(decode_attention(*arguments, **options, **more))


LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, TOKEN_BLOCK - 1, TOKEN_BLOCK, TOKEN_BLOCK + 1, 61, SPAN, 257, 1009)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_around_pages_and_blocks_match(length, formats):
    assert_matches_definition(*case([length], [1], 2, 2, 64, *formats))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("head_dim", native.HEAD_DIMS)
def test_every_head_dim_matches(head_dim, formats):
    assert_matches_definition(*case([77, 130], [1, 3], 2, 3, head_dim, *formats))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 17])
def test_every_number_of_query_heads_matches(group, formats):
    assert_matches_definition(*case([50], [1], 3, group, 64, *formats))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize(
    ("context_lens", "num_queries"),
    [
        ([1], [1]),
        ([5], [5]),  # nothing but the query tokens
        ([16], [16]),
        ([TOKEN_BLOCK + 1], [2]),
        ([TOKEN_BLOCK + 2, 40, 16, 131], [5, 1, 16, 2]),
        ([SPAN + 1, 7], [3, 7]),  # the first query token sees nothing of the last span
    ],
)
def test_several_query_tokens_match(context_lens, num_queries, group, formats):
    assert_matches_definition(*case(context_lens, num_queries, 2, group, 64, *formats))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("page_tokens", [1, 3, 16, 64, 100])
def test_every_page_size_matches(page_tokens):
    assert_matches_definition(inputs([1, 200, 99], 2, 2, 16, torch.bfloat16, page_tokens))


@pytest.fixture(scope="module", params=FORMATS)
def split(request: pytest.FixtureRequest) -> tuple[Arguments, Options, tolerance.Expected]:
    """Long enough for the launcher to use every thread and to split, with short requests beside; and what is right."""
    arguments, options = case([9001, 1, 40, 3000], [2, 1, 1, 1], 2, 2, 64, *request.param)
    return arguments, options, tolerance.decode_attention(*arguments, **options)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_contexts_split_over_threads_match(num_threads, split):
    arguments, options, expected = split
    expected.check(decode_attention(*arguments, **options, num_threads=num_threads))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("group", [1, 4])
def test_a_query_gives_the_same_bits_alone_among_drafts_and_in_any_batch(group, formats, name):
    context_lens, num_queries = [LONGER_SPANS + 2, 300, 5 * SPAN + 1, TOKEN_BLOCK], [5, 3, 4, 1]
    arguments, options = case(context_lens, num_queries, 2, group, 64, *formats)
    q, k_pages, v_pages, block_table, _ = arguments
    scales = {key: value for key, value in options.items() if key != "cu_seqlens_q_R1"}
    with use_variant(name):
        together = decode_attention(*arguments, **options, num_threads=3)
        query = 0
        for request, (length, count) in enumerate(zip(context_lens, num_queries, strict=True)):
            table = block_table[request : request + 1]
            for seen in range(length - count + 1, length + 1):
                one = torch.tensor([seen], dtype=torch.int32)
                alone = decode_attention(q[query : query + 1], k_pages, v_pages, table, one, **scales, num_threads=1)
                assert torch.equal(together[query], alone[0])
                query += 1


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("length", [40, TOKEN_BLOCK + 2, SPAN + 2, LONGER_SPANS + 2])
def test_query_tokens_never_see_later_ones(length, formats):
    arguments, options = case([length, 9], [5, 1], 1, 3, 16, *formats)
    expected = decode_attention(*arguments, **options)
    _, k_pages, v_pages, block_table, _ = arguments
    changed = (options["k_scales_BPK"], options["v_scales_BPK"]) if formats[1] == torch.int8 else (k_pages, v_pages)
    for token, value in ((length - 1, float("nan")), (length - 2, float("inf"))):  # the last two query tokens
        for tensor in changed:
            tensor[block_table[0, token // 16], token % 16] = value
    out = decode_attention(*arguments, **options)
    assert torch.equal(out[:3], expected[:3])
    assert out[3:5].isnan().all()
    assert torch.equal(out[5], expected[5])


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["k_scales_BPK", "v_scales_BPK"])
def test_scales_that_are_not_finite_give_what_the_definition_gives(name, value):
    arguments, options = case([100, 90], [2, 1], 2, 2, 64, torch.float32, torch.int8)
    options[name][arguments[3][0, 1], 3, 1] = value
    out, reference = (f(*arguments, **options) for f in (decode_attention, decode_attention_reference))
    assert not reference.isfinite().all()
    assert torch.equal(out.isnan(), reference.isnan())
    assert torch.equal(out.isposinf(), reference.isposinf())
    assert torch.equal(out.isneginf(), reference.isneginf())


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [-1.0, 0.0, 1e-34])
def test_values_with_scales_that_no_digits_hold_match(factor, dtype):
    """Negative ones, and blocks in which all are tiny or zero, beside rows and blocks of ordinary ones."""
    arguments, options = case([3 * TOKEN_BLOCK + 9, 90], [3, 1], 2, 3, 64, dtype, torch.int8)
    pages = arguments[3][0, TOKEN_BLOCK // 16 : 2 * TOKEN_BLOCK // 16]
    options["v_scales_BPK"][pages.long(), :, 0] *= factor
    options["v_scales_BPK"][arguments[3][0, 0], 5, 1] *= factor
    assert_matches_definition(arguments, options)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_light_int8_values_count_beside_a_heavy_one(dtype):
    """A weight is held to the largest one of its block, its value's scale included, and not to its row's."""
    arguments, options = case([9 * TOKEN_BLOCK], [1], 1, 2, 64, dtype, torch.int8)
    q, k_pages, _, block_table, _ = arguments
    first = block_table[0, 0]
    # Scores of 16 and 0: the others have exp(-16) of the weight each.
    q.fill_(1.0)
    k_pages.fill_(0)
    k_pages[first, 0] = 2
    options["k_scales_BPK"].fill_(1.0)
    options["v_scales_BPK"][first, 0] = 0.0
    assert_matches_definition(arguments, options)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_the_largest_whole_numbers_fit(dtype):
    """Features, keys, weights and values of int8 pages, each as large as it gets and all of one sign."""
    arguments, options = case([3 * TOKEN_BLOCK], [1], 1, 4, max(native.HEAD_DIMS), dtype, torch.int8)
    q, k_pages, v_pages, *_ = arguments
    q.fill_(1.0)
    for pages, scales in ((k_pages, options["k_scales_BPK"]), (v_pages, options["v_scales_BPK"])):
        pages.fill_(-128)
        scales.fill_(2.0**-7)
    assert_matches_definition(arguments, options)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_far_above_all_others_takes_all_the_weight(dtype):
    q, k_pages, v_pages, block_table, context_lens = inputs([200], 1, 2, 64, dtype)
    q[:] = 1.0
    k_pages[:] = -1e4
    k_pages[block_table[0, 5], 2] = 1e4
    assert_matches_definition((q, k_pages, v_pages, block_table, context_lens))


@pytest.mark.usefixtures("variant")
def test_a_page_may_stand_in_many_places():
    q, k_pages, v_pages, block_table, context_lens = inputs([64, 64], 2, 2, 64, torch.float32)
    block_table[0, :4] = block_table[0, 2]
    block_table[1, :4] = block_table[0, 2]
    assert_matches_definition((q, k_pages, v_pages, block_table, context_lens))


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
    wide_table = torch.full((2, 40), -1, dtype=torch.int32)
    wide_table[:, : block_table.shape[1]] = block_table
    strided_q = q.transpose(1, 2).contiguous().transpose(1, 2)
    strided_table, lens = wide_table[:, : block_table.shape[1]], context_lens.repeat(2).view(2, 2)[0]
    assert_matches_definition((strided_q, k_pages, v_pages, strided_table, lens))


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
    # 4 GiB of addresses each; only the pages used are written, and the rest takes no memory.
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
    expected = [tolerance.decode_attention(*case) for case in cases]
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
            expected[i].check(out)
    assert len(results) == 3


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t[0], "q_TKGD has shape"),
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


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cu_seqlens_q_R1", lambda t: t[:2], "cu_seqlens_q_R1 has shape"),
        ("cu_seqlens_q_R1", lambda t: t.long(), "cu_seqlens_q_R1 has dtype"),
        ("cu_seqlens_q_R1", lambda t: t + 1, "cu_seqlens_q_R1 runs from 1 to 20"),
        ("cu_seqlens_q_R1", lambda t: t.clamp(max=18), "cu_seqlens_q_R1 runs from 0 to 18"),
        ("cu_seqlens_q_R1", lambda t: t.index_fill(0, torch.tensor([1]), 0), "requests 0 to 19 query tokens"),
        ("cu_seqlens_q_R1", lambda t: t.index_fill(0, torch.tensor([1]), 2), "requests 2 to 17 query tokens"),
        ("cu_seqlens_q_R1", lambda t: t.index_fill(0, torch.tensor([1]), 7), r"context_lens_R\[0\]=5 is below the 7"),
        ("k_scales_BPK", lambda _: None, "k_scales_BPK is None"),
        ("v_scales_BPK", lambda _: None, "v_scales_BPK is None"),
        ("k_scales_BPK", lambda t: t[:1], "k_scales_BPK has shape"),
        ("v_scales_BPK", lambda t: t.float(), "v_scales_BPK has dtype"),
        ("v_scales_BPK", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), "v_scales_BPK has strides"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(name, change, message):
    arguments, options = case([5, 70], [5, 14], 2, 2, 16, torch.float32, torch.int8)
    options[name] = change(options[name])
    with pytest.raises(ValueError, match=message):
        decode_attention(*arguments, **options)


def test_scales_without_int8_pages_are_refused_by_name():
    _, options = case([20], [1], 2, 2, 16, torch.float32, torch.int8)
    arguments = inputs([20], 2, 2, 16, torch.float32)
    with pytest.raises(ValueError, match="k_scales_BPK is given"):
        decode_attention(*arguments, k_scales_BPK=options["k_scales_BPK"])
