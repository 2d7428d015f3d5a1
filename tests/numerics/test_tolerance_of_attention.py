"""The budgets of attention bite: plain attention in the working dtype is inside, a faulty one is not."""

import pytest
import torch
from colm_kernels import tolerance
from colm_kernels.decode_attention import decode_attention_reference
from colm_kernels.kv_quantise import quantise_kv_reference
from colm_kernels.sparse_index import Tiling, lower
from colm_kernels.sparse_prefill_attention import sparse_prefill_attention_reference
from torch import Tensor

from tests.kernel_inputs import prefill_inputs
from tests.spoilt_results import DTYPES, accumulated, draw, mutations, rejects, swapped, without


def attention_case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return prefill_inputs(64, 1024, 6, 2, 64, dtype)


def half_listed():
    tiling = Tiling(num_queries=64, num_keys=1024)
    wanted = torch.rand(2, 1, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    return lower(tiling, wanted, torch.tensor([[100, 300], [5, 700]]))


def attention(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, weights_dtype: torch.dtype, scale: float = 1.0, ahead=0):
    """Plain attention in fp32, with weights rounded to a dtype; `ahead` keys beyond the mask are seen too."""
    num_queries, num_keys = q_THD.shape[0], k_KSD.shape[1]
    k, v = (tensor.float().repeat_interleave(q_THD.shape[1] // len(tensor), dim=0) for tensor in (k_KSD, v_KSD))
    scores = q_THD.float().transpose(0, 1) @ k.mT * (scale * q_THD.shape[2] ** -0.5)
    future = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(num_keys - num_queries + 1 + ahead)
    scores.masked_fill_(future, -torch.inf)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    out = weights.to(weights_dtype).float() @ v / weights.sum(dim=-1, keepdim=True)
    return out.transpose(0, 1).to(q_THD.dtype), scores.logsumexp(dim=-1).T


def listed(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, index):
    out, lse = sparse_prefill_attention_reference(q_THD.float(), k_KSD.float(), v_KSD.float(), index)
    return out.to(q_THD.dtype), lse


@DTYPES
def test_plain_attention_is_inside(dtype):
    case = attention_case(dtype)
    tolerance.check_all(tolerance.prefill_attention(*case), attention(*case, dtype))
    index = half_listed()
    tolerance.check_all(tolerance.prefill_attention(*case, index), listed(*case, index))


@DTYPES
@mutations(
    swapped_values=lambda q, k, v: attention(q, k, swapped(v, 1), q.dtype),
    swapped_features=lambda q, k, v: attention(q, k, swapped(v, 2), q.dtype),
    swapped_heads=lambda q, k, v: attention(swapped(q, 1), k, v, q.dtype),
    dropped_feature=lambda q, k, v: attention(without(q, 2), k, v, q.dtype),
    wrong_scale=lambda q, k, v: attention(q, k, v, q.dtype, scale=1.02),
    one_key_too_many=lambda q, k, v: attention(q, k, v, q.dtype, ahead=1),
    one_key_missing=lambda q, k, v: attention(q, k, v, q.dtype, ahead=-1),
    sums_in_bf16=lambda q, k, v: bf16_attention(q, k, v),
)
def test_wrong_attention_is_outside(mutate, dtype):
    case = attention_case(dtype)
    rejects(tolerance.prefill_attention(*case)[0], mutate(*case)[0])


def bf16_attention(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor) -> tuple[Tensor]:
    """Attention whose values are summed in bf16, key by key."""
    group = q_THD.shape[1] // len(k_KSD)
    scores = torch.einsum("thd,hsd->hts", q_THD.float(), k_KSD.float().repeat_interleave(group, dim=0)) / 8
    scores.masked_fill_(torch.ones(64, 1024, dtype=torch.bool).triu(961), -torch.inf)
    heads = [accumulated(weights, v_KSD[head // group].T) for head, weights in enumerate(scores.softmax(dim=-1))]
    return (torch.stack(heads, dim=1).to(q_THD.dtype),)


@DTYPES
@pytest.mark.parametrize("key", [0, 17, 511, 959])
def test_the_log_sum_exp_misses_any_one_key(key, dtype):
    q, k, v = attention_case(dtype)
    k[:, key] = draw(2, 64, seed=key).to(dtype)  # no rarer than the others
    _, expected = tolerance.prefill_attention(q, k, v)
    others = [other for other in range(1024) if other != key]
    rejects(expected, attention(q, k[:, others], v[:, others], dtype)[1])


def test_a_missing_key_of_weight_is_missed_in_the_output_too():
    q, k, v = attention_case(torch.float32)
    others = [other for other in range(1024) if other != 17]
    rejects(tolerance.prefill_attention(q, k, v)[0], attention(q, k[:, others], v[:, others], torch.float32)[0])


@DTYPES
def test_a_listed_column_that_is_left_out_is_missed(dtype):
    case, index = attention_case(dtype), half_listed()
    fewer = lower(
        index.tiling,
        torch.rand(2, 1, 16, generator=torch.Generator().manual_seed(0)) < 0.5,
        torch.tensor([[100, 100], [5, 5]]),
    )
    assert fewer.density() < index.density()
    rejects(tolerance.prefill_attention(*case, index)[1], listed(*case, fewer)[1])


def decode_case(dtype: torch.dtype, quantised: bool = False) -> tuple[list[Tensor], dict[str, Tensor]]:
    pages = draw(2, 70, 16, 2, 64)
    table = torch.randperm(70, generator=torch.Generator().manual_seed(1)).int()[:64].view(1, 64)
    options = {}
    if quantised:
        parts = [quantise_kv_reference(part.flatten(0, 1)) for part in pages]
        k_pages, v_pages = (q_SKD.view(70, 16, 2, 64) for q_SKD, _ in parts)
        options = {
            name: scale_SK.view(70, 16, 2)
            for name, (_, scale_SK) in zip(("k_scales_BPK", "v_scales_BPK"), parts, strict=True)
        }
    else:
        k_pages, v_pages = pages.to(dtype)
    return [draw(1, 2, 4, 64, seed=2).to(dtype), k_pages, v_pages, table, torch.tensor([1010]).int()], options


@DTYPES
@pytest.mark.parametrize("quantised", [False, True])
def test_plain_decode_attention_is_inside(quantised, dtype):
    case, options = decode_case(dtype, quantised)
    tolerance.decode_attention(*case, **options).check(decode_attention_reference(*case, **options))


@DTYPES
@pytest.mark.parametrize("quantised", [False, True])
@mutations(
    swapped_pages=lambda q, k, v, table, lens: (q, k, v, swapped(table, 1).flip(1), lens),
    swapped_values=lambda q, k, v, table, lens: (q, k, swapped(v, 1), table, lens),
    one_token_missing=lambda q, k, v, table, lens: (q, k, v, table, lens - 1),
    one_token_too_many=lambda q, k, v, table, lens: (q, k, v, table, lens + 1),
    wrong_scale=lambda q, k, v, table, lens: (q * 1.02, k, v, table, lens),
    swapped_heads=lambda q, k, v, table, lens: (swapped(q, 2), k, v, table, lens),
)
def test_wrong_decode_attention_is_outside(mutate, quantised, dtype):
    case, options = decode_case(dtype, quantised)
    rejects(tolerance.decode_attention(*case, **options), decode_attention_reference(*mutate(*case), **options))


@DTYPES
def test_a_dropped_scale_of_int8_pages_is_outside(dtype):
    case, options = decode_case(dtype, quantised=True)
    wrong = options | {"v_scales_BPK": swapped(options["v_scales_BPK"], 1)}
    rejects(tolerance.decode_attention(*case, **options), decode_attention_reference(*case, **wrong))


def test_weights_rounded_to_bf16_are_outside_where_fp32_is_promised():
    case, _ = decode_case(torch.float32)
    q, k_pages, v_pages, table, lens = case
    rounded = [pages[table[0].long()].flatten(0, 1)[: int(lens)].transpose(0, 1) for pages in (k_pages, v_pages)]
    out, _ = attention(q.flatten(1, 2), *rounded, torch.bfloat16)
    rejects(tolerance.decode_attention(*case), out.view_as(q))
