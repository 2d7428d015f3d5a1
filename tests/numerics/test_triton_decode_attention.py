"""Paged decode attention in Triton, against the definition, within the budget of tolerance.py."""

from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch
from colm_kernels import tolerance
from colm_kernels.gpu import decode_attention as on_gpu
from torch import Tensor

from tests.gpu import TRITON_DTYPES as DTYPES

pytestmark = [
    pytest.mark.usefixtures("where_triton_runs"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of the interpreter
]

PART = on_gpu.MIN_PART_TOKENS


@dataclass(kw_only=True)
class Case:
    q_TKGD: Tensor
    pages: list[Tensor]
    """Arguments of one call, with keys and values in q's dtype or int8."""
    scales: list[Tensor] | None
    block_table_RM: Tensor
    context_lens_R: Tensor
    query_lens: list[int]

    def arguments(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        options = {}
        if any(length != 1 for length in self.query_lens):
            options["cu_seqlens_q_R1"] = torch.tensor([0, *accumulate(self.query_lens)], dtype=torch.int32)
        if self.scales is not None:
            options["k_scales_BPK"], options["v_scales_BPK"] = self.scales
        return (self.q_TKGD, *self.pages, self.block_table_RM, self.context_lens_R), options

    def run(self) -> Tensor:
        arguments, options = self.arguments()
        return on_gpu.decode_attention(*arguments, **options)


def case(
    context_lens, num_kv_heads, group, head_dim, dtype, *, page_tokens=16, query_lens=None, quantised=False
) -> Case:
    """Pages in random order, NaN wherever no context reaches, -1 in the table past each context."""
    generator = torch.Generator().manual_seed(sum(context_lens) + group)
    query_lens = query_lens or [1] * len(context_lens)
    num_pages_R = [-(-length // page_tokens) for length in context_lens]
    num_pages = sum(num_pages_R) + 3
    order = torch.randperm(num_pages, generator=generator).to(torch.int32)
    block_table = torch.full((len(context_lens), max(num_pages_R) + 1), -1, dtype=torch.int32)
    is_token = torch.zeros(num_pages, page_tokens, dtype=torch.bool)
    used = 0
    for request, (length, count) in enumerate(zip(context_lens, num_pages_R, strict=True)):
        ids = order[used : used + count]
        used += count
        block_table[request, :count] = ids
        is_token[ids.long()] = (torch.arange(count * page_tokens) < length).view(count, page_tokens)
    shape = (num_pages, page_tokens, num_kv_heads, head_dim)
    nan = torch.tensor(float("nan"))
    scales = None
    if quantised:
        pages = [torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8) for _ in "kv"]
        drawn = [torch.rand(shape[:3], generator=generator) * 0.03 for _ in "kv"]
        scales = [torch.where(is_token[..., None], scale, nan).bfloat16() for scale in drawn]
    else:
        drawn = [torch.randn(shape, generator=generator) for _ in "kv"]
        pages = [torch.where(is_token[..., None, None], page, nan).to(dtype) for page in drawn]
    return Case(
        q_TKGD=torch.randn(sum(query_lens), num_kv_heads, group, head_dim, generator=generator).to(dtype),
        pages=pages,
        scales=scales,
        block_table_RM=block_table,
        context_lens_R=torch.tensor(context_lens, dtype=torch.int32),
        query_lens=query_lens,
    )


def assert_matches_definition(tested: Case) -> None:
    arguments, options = tested.arguments()
    tolerance.decode_attention(*arguments, **options, weights_dtype=tested.q_TKGD.dtype).check(tested.run())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 61])
def test_lengths_around_pages_and_blocks_match(length, dtype):
    assert_matches_definition(case([length], 2, 2, 64, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [PART - 1, PART, PART + 1, 3 * PART + 61])
def test_contexts_of_several_parts_match(length, dtype):
    assert_matches_definition(case([length, 5], 1, 2, 16, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
def test_every_head_dim_matches(head_dim, dtype):
    assert_matches_definition(case([77, 130], 2, 3, head_dim, dtype))


@pytest.mark.parametrize("group", [1, 3, 8, 17])
def test_every_number_of_query_heads_matches(group):
    assert_matches_definition(case([50], 3, group, 64, torch.float32))


@pytest.mark.parametrize("page_tokens", [1, 3, 16, 64, 100])
def test_every_page_size_matches(page_tokens):
    assert_matches_definition(case([1, 200, 99], 2, 2, 16, torch.float16, page_tokens=page_tokens))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("query_lens", [[5], [1, 16, 2], [3, 1, 1]])
def test_query_tokens_of_a_request_see_each_other_causally(query_lens, quantised, dtype):
    context_lens = [length + 40 * request for request, length in enumerate(query_lens)]
    assert_matches_definition(case(context_lens, 2, 4, 16, dtype, query_lens=query_lens, quantised=quantised))


def test_a_part_that_early_query_tokens_do_not_see_weighs_nothing():
    assert_matches_definition(case([PART + 2], 1, 2, 16, torch.float32, query_lens=[7]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_int8_pages_match_what_they_dequantise_to(head_dim, dtype):
    assert_matches_definition(case([77, PART + 30, 1], 1, 3, head_dim, dtype, quantised=True))


@pytest.mark.parametrize("quantised", [False, True])
def test_later_tokens_leave_earlier_query_tokens_to_the_bit(quantised):
    tested = case([40], 1, 2, 16, torch.float32, query_lens=[5], quantised=quantised)
    before = tested.run()
    page, slot = tested.block_table_RM[0, 38 // 16], 38 % 16
    for pages in tested.pages:
        pages[page, slot] = 100
    after = tested.run()
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3:], after[3:])


def test_requests_side_by_side_do_not_touch_each_other():
    tested = case([300, 17, 90], 2, 2, 16, torch.float16, query_lens=[2, 1, 4])
    together = tested.run()
    first = 0
    for request, length in enumerate(tested.query_lens):
        alone = replace(
            tested,
            q_TKGD=tested.q_TKGD[first : first + length],
            block_table_RM=tested.block_table_RM[request : request + 1],
            context_lens_R=tested.context_lens_R[request : request + 1],
            query_lens=[length],
        )
        assert torch.equal(alone.run(), together[first : first + length])
        first += length


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_request_and_column(value):
    tested = case([PART + 100, 90], 1, 2, 16, torch.float32)
    k_pages, v_pages = tested.pages
    page = tested.block_table_RM[0, 1]
    v_pages[page, 3, 0, 7] = value
    out = tested.run()
    assert not out[0, 0, :, 7].isfinite().any()
    assert out[0, 0, :, :7].isfinite().all()
    assert out[1].isfinite().all()
    k_pages[page, 3, 0, 7] = value
    assert tested.run()[1].isfinite().all()


def test_a_part_of_scores_of_minus_infinity_weighs_nothing():
    tested = case([PART + 100], 1, 1, 16, torch.float32)
    tested.q_TKGD.fill_(1.0)
    pages = tested.block_table_RM[0, PART // 16 : (PART + 100) // 16 + 1].long()
    tested.pages[0][pages] = float("-inf")
    assert_matches_definition(tested)


def test_pages_past_two_to_the_31_elements_are_read():
    head_dim, page_tokens = 128, 64
    num_pages = 2**31 // (head_dim * page_tokens) + 8
    # 4 GiB of addresses each; only the pages used are written, and the rest takes no memory.
    far = [torch.empty(num_pages, page_tokens, 1, head_dim, dtype=torch.float16) for _ in "kv"]
    near = case([100], 1, 2, head_dim, torch.float16, page_tokens=page_tokens)
    table = torch.tensor([[num_pages - 1, num_pages - 3]], dtype=torch.int32)
    for column in (0, 1):
        for pages, small in zip(far, near.pages, strict=True):
            pages[table[0, column]] = small[near.block_table_RM[0, column]]
    assert torch.equal(replace(near, pages=far, block_table_RM=table).run(), near.run())


def test_no_requests_give_an_empty_result():
    tested = case([5], 2, 2, 16, torch.float32)
    empty = replace(
        tested,
        q_TKGD=tested.q_TKGD[:0],
        block_table_RM=tested.block_table_RM[:0],
        context_lens_R=tested.context_lens_R[:0],
        query_lens=[],
    )
    assert empty.run().shape == (0, 2, 2, 16)
