"""The budgets bite: a plain implementation in the working dtype is within them, a faulty one is not.

Shapes: as in the operations; R rows, I inputs, O outputs, T queries, S keys, H query heads, K kv heads, D head dim.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from colm_kernels import tolerance
from colm_kernels.chain_linear import chain_linear_reference
from colm_kernels.decode_attention import decode_attention_reference
from colm_kernels.kv_quantise import dequantise_kv, quantise_kv_reference
from colm_kernels.rms_norm import rms_norm_reference
from colm_kernels.rotary import rotate_reference
from colm_kernels.sparse_index import Tiling, lower
from colm_kernels.sparse_prefill_attention import sparse_prefill_attention_reference
from colm_kernels.swiglu import swiglu_reference
from colm_kernels.tolerance import Expected
from torch import Tensor

from tests.kernel_inputs import prefill_inputs, staircase_inputs
from tests.tiny import tiny_config, tiny_model

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
EPS = 1e-5
Mutation = Callable[..., object]


def rejects(expected: Expected, result: Tensor) -> None:
    with pytest.raises(AssertionError, match="over their budget"):
        expected.check(result)


def mutations(**each: Mutation) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("mutate", each.values(), ids=each)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def swapped(tensor: Tensor, dim: int) -> Tensor:
    """The tensor with its third and fourth elements along a dimension exchanged."""
    order = torch.arange(tensor.shape[dim])
    order[2:4] = order[2:4].flip(0)
    return tensor.index_select(dim, order)


def without(tensor: Tensor, dim: int, at: int = 5) -> Tensor:
    """The tensor with one element along a dimension set to zero."""
    return tensor.index_fill(dim, torch.tensor([at]), 0)


def without_one(weight_OI: Tensor) -> Tensor:
    """The tensor with its largest element set to zero."""
    return weight_OI.where(weight_OI.abs() < weight_OI.abs().max(), 0)


def accumulated(x_RI: Tensor, weight_OI: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A product whose terms are added one by one and rounded to a dtype each time."""
    y_RO = torch.zeros(len(x_RI), len(weight_OI), dtype=dtype)
    for i in range(x_RI.shape[1]):
        y_RO += (x_RI[:, i, None].float() * weight_OI[:, i].float()).to(dtype)
    return y_RO.to(x_RI.dtype)


# Linear (chain): the feed-forward of a model of 135M parameters, in two chains.

ROWS = 64


def linear_case(dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor], tuple[int, int]]:
    x_RI, weights, biases = staircase_inputs(ROWS, [432, 144], [1152, 384], dtype)
    return x_RI, weights, biases, (ROWS, ROWS - 7)


def linear_gradients(x_RI, weights, biases, chain_rows, grad_RO) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in (x_RI, *weights, *biases)]
    y_RO = chain_linear_reference(leaves[0], leaves[1:3], leaves[3:], chain_rows)
    return torch.autograd.grad(y_RO, leaves, grad_RO)


@DTYPES
def test_a_plain_linear_is_inside_with_its_gradients(dtype):
    case = linear_case(dtype)
    # With its bias in one product, where the definition rounds in between.
    x_RI, weights, biases, (_, rows) = case
    y_RO = torch.cat([torch.addmm(b, x_RI[:, : w.shape[1]], w.T) for w, b in zip(weights, biases, strict=True)], dim=1)
    y_RO[rows:, len(weights[0]) :] = 0
    tolerance.linear(*case).check(y_RO)
    grad_RO = draw(*y_RO.shape, seed=1).to(dtype)
    tolerance.check_all(tolerance.linear_gradients(*case, grad_RO), linear_gradients(*case, grad_RO))


@DTYPES
@pytest.mark.parametrize("of", [lambda tensor: tensor, torch.abs], ids=["both signs", "one sign"])
def test_the_worst_order_of_sums_is_inside(of, dtype):
    """One term after the other, as no library sums, at shapes where another processor's order broke older budgets."""
    x_RI, (weight_OI,), _ = staircase_inputs(257, [12], [1027], dtype)
    x_RI, weight_OI, grad_RO = of(x_RI), of(weight_OI), of(draw(257, 1027, seed=1).to(dtype))
    tolerance.linear(grad_RO, [weight_OI.T], None, (257,)).check(accumulated(grad_RO, weight_OI.T, torch.float32))
    of_x, of_weight = tolerance.linear_gradients(x_RI, [weight_OI], None, (257,), grad_RO)
    of_x.check(accumulated(grad_RO, weight_OI.T, torch.float32))
    of_weight.check(accumulated(grad_RO.T, x_RI.T, torch.float32))


@DTYPES
@mutations(
    dropped_input=lambda x, w, b, rows: (without(x, 1), w, b, rows),
    dropped_row=lambda x, w, b, rows: (without(x, 0), w, b, rows),
    swapped_inputs=lambda x, w, b, rows: (swapped(x, 1), w, b, rows),
    swapped_outputs=lambda x, w, b, rows: (x, [w[0], swapped(w[1], 0)], b, rows),
    dropped_output=lambda x, w, b, rows: (x, [without(w[0], 0), w[1]], b, rows),
    one_weight=lambda x, w, b, rows: (x, [without_one(w[0]), w[1]], b, rows),
    wrong_scale=lambda x, w, b, rows: (x, [w[0], w[1] * 1.01], b, rows),
    no_bias=lambda x, w, b, rows: (x, w, [b[0], b[1] * 0], rows),
    one_row_more=lambda x, w, b, rows: (x, w, b, (rows[0], rows[1] + 1)),
)
def test_a_wrong_linear_is_outside(mutate, dtype):
    case = linear_case(dtype)
    rejects(tolerance.linear(*case), chain_linear_reference(*mutate(*case)))


@DTYPES
def test_a_linear_accumulated_in_bf16_is_outside(dtype):
    x_RI, weights, _, _ = linear_case(dtype)
    rejects(tolerance.linear(x_RI, weights[1:], None, (ROWS,)), accumulated(x_RI, weights[1]))


@DTYPES
@mutations(
    dropped_output=lambda x, w, b, rows, grad: (x, w, b, rows, without(grad, 1)),
    dropped_row=lambda x, w, b, rows, grad: (without(x, 0), w, b, rows, without(grad, 0)),
    swapped_rows=lambda x, w, b, rows, grad: (swapped(x, 0), w, b, rows, grad),
    swapped_outputs=lambda x, w, b, rows, grad: (x, [swapped(w[0], 0), w[1]], b, rows, swapped(grad, 1)),
    wrong_scale=lambda x, w, b, rows, grad: (x, w, b, rows, grad * 1.02),
)
def test_wrong_gradients_are_outside(mutate, dtype):
    case = (*linear_case(dtype), draw(ROWS, 1536, seed=1).to(dtype))
    expected, results = tolerance.linear_gradients(*case), linear_gradients(*mutate(*case))
    with pytest.raises(AssertionError, match="over their budget"):
        tolerance.check_all(expected, results)


@DTYPES
def test_gradients_accumulated_in_bf16_are_outside(dtype):
    x_RI, weights, _, _ = linear_case(dtype)
    weight_OI, grad_RO = weights[1], draw(ROWS, 384, seed=1).to(dtype)
    of_x, of_weight = tolerance.linear_gradients(x_RI, [weight_OI], None, (ROWS,), grad_RO)
    rejects(of_x, accumulated(grad_RO, weight_OI.T))
    rejects(of_weight, accumulated(grad_RO.T, x_RI.T))


# Attention: a tile of 64 queries behind 960 keys.


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


# The small operations.


@DTYPES
def test_a_plain_norm_is_inside(dtype):
    x_RD, gains = 3 * draw(8, 768).to(dtype), [draw(576, seed=1).to(dtype), draw(192, seed=2).to(dtype)]
    tolerance.rms_norm(x_RD, gains, EPS).check(rms_norm_reference(x_RD, gains, EPS))


def norm_of_less(x_RD: Tensor, gains: list[Tensor], num_dropped: int) -> Tensor:
    """RMSNorm whose mean of the squares leaves out the last features."""
    parts = []
    for x, gain in zip(x_RD.float().split([len(gain) for gain in gains], dim=1), gains, strict=True):
        mean = x[:, : x.shape[1] - num_dropped].square().sum(dim=1, keepdim=True) / x.shape[1]
        parts.append((x * torch.rsqrt(mean + EPS)).to(x_RD.dtype) * gain)
    return torch.cat(parts, dim=1)


@DTYPES
@mutations(
    swapped_features=lambda x, g: rms_norm_reference(swapped(x, 1), g, EPS),
    swapped_gains=lambda x, g: rms_norm_reference(x, [swapped(g[0], 0), g[1]], EPS),
    one_norm_for_all_chains=lambda x, g: rms_norm_reference(x, [torch.cat(g)], EPS),
    # Of 576 features, one is a twelfth of a rounding of bf16; a vector of 16 is more than one.
    dropped_terms=lambda x, g: norm_of_less(x, g, 1 if x.dtype == torch.float32 else 16),
    wrong_scale=lambda x, g: rms_norm_reference(x, [g[0], g[1] * 1.02], EPS),
    wrong_eps=lambda x, g: rms_norm_reference(x, g, 1e-3 if x.dtype == torch.float32 else 1.0),
    no_gain=lambda x, g: rms_norm_reference(x, [torch.ones_like(gain) for gain in g], EPS),
)
def test_a_wrong_norm_is_outside(mutate, dtype):
    x_RD, gains = 3 * draw(8, 768).to(dtype), [draw(576, seed=1).to(dtype), draw(192, seed=2).to(dtype)]
    rejects(tolerance.rms_norm(x_RD, gains, EPS), mutate(x_RD, gains))


@DTYPES
def test_squares_summed_in_bf16_are_outside(dtype):
    x_RD, gain = 3 * draw(8, 576).to(dtype), draw(576, seed=1).to(dtype)
    mean = torch.stack([accumulated(x[None].float(), x[None].float())[0] for x in x_RD]) / 576
    result = (x_RD.float() * torch.rsqrt(mean + EPS)).to(dtype) * gain
    rejects(tolerance.rms_norm(x_RD, [gain], EPS), result)


def angles(num_tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    steps = 10_000 ** (-torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2))
    angle_TD = (torch.arange(num_tokens, dtype=torch.float64)[:, None] * steps).repeat(1, 2)
    return angle_TD.cos().float(), angle_TD.sin().float()


@DTYPES
@mutations(
    swapped_features=lambda x, cos, sin: rotate_reference(swapped(x, 2), cos, sin),
    next_position=lambda x, cos, sin: rotate_reference(x, cos.roll(1, 0), sin.roll(1, 0)),
    other_way=lambda x, cos, sin: rotate_reference(x, cos, -sin),
    dropped_term=lambda x, cos, sin: rotate_reference(x, cos, without(sin, 1)),
    wrong_scale=lambda x, cos, sin: rotate_reference(x, cos * 1.01, sin * 1.01),
    interleaved=lambda x, cos, sin: rotate_reference(x.unflatten(2, (2, -1)).transpose(2, 3).flatten(2), cos, sin),
    in_bf16=lambda x, cos, sin: rotate_in_bf16(x, cos, sin),
)
def test_a_wrong_rotation_is_outside_and_a_plain_one_inside(mutate, dtype):
    x_TND, (cos, sin) = draw(64, 3, 64).to(dtype), angles(64, 64)
    expected = tolerance.rotary(x_TND, cos, sin)
    expected.check(rotate_reference(x_TND, cos, sin))
    rejects(expected, mutate(x_TND, cos, sin))


def rotate_in_bf16(x_TND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_TND.bfloat16().chunk(2, dim=-1)
    c, s = cos[:, None, :32].bfloat16(), sin[:, None, :32].bfloat16()
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x_TND.dtype)


@DTYPES
@mutations(
    swapped_features=lambda gate, up: swiglu_reference(swapped(gate, 1), up),
    gate_for_up=lambda gate, up: swiglu_reference(up, gate),
    dropped_row=lambda gate, up: swiglu_reference(gate, without(up, 0)),
    wrong_scale=lambda gate, up: swiglu_reference(gate, up * 1.02),
    gelu=lambda gate, up: torch.nn.functional.gelu(gate) * up,
    no_exponential=lambda gate, up: gate.clamp_min(0) * up,
    in_bf16=lambda gate, up: (gate.bfloat16() * (1 / (1 + (-gate.bfloat16()).exp())) * up.bfloat16()).to(gate.dtype),
)
def test_a_wrong_swiglu_is_outside_and_a_plain_one_inside(mutate, dtype):
    gate_RF, up_RF = 4 * draw(2, 8, 1536).to(dtype)
    expected = tolerance.swiglu(gate_RF, up_RF)
    expected.check(swiglu_reference(gate_RF, up_RF))
    rejects(expected, mutate(gate_RF, up_RF))


@DTYPES
@mutations(
    swapped_inputs=lambda x, gate, up: (swapped(x, 1), gate, up),
    swapped_outputs=lambda x, gate, up: (x, gate, swapped(up, 0)),
    gate_for_up=lambda x, gate, up: (x, up, gate),
    one_weight=lambda x, gate, up: (x, without_one(gate), up),
    wrong_scale=lambda x, gate, up: (x, gate, up * 1.02),
)
def test_a_wrong_swiglu_of_linears_is_outside_and_a_rounded_one_inside(mutate, dtype):
    x_RI, (gate_OI, up_OI), _ = staircase_inputs(ROWS, [576, 0], [384, 384], dtype)
    gate_OI, up_OI = (weight / weight.shape[1] ** 0.5 for weight in (gate_OI, up_OI))

    def run(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return swiglu_reference(x @ gate.T, x @ up.T)

    expected = tolerance.swiglu_linear(x_RI, ([gate_OI], None, (ROWS,)), ([up_OI], None, (ROWS,)))
    expected.check(run(x_RI, gate_OI, up_OI))
    rejects(expected, run(*mutate(x_RI, gate_OI, up_OI)))


@DTYPES
@mutations(
    swapped_features=lambda _x, q, scale: (swapped(q, 2), scale),
    swapped_scales=lambda _x, q, scale: (q, swapped(scale, 0)),
    rounded_down=lambda x, _q, scale: ((x.float() / scale.float()[..., None]).floor().to(torch.int8), scale),
    seven_bits=lambda _x, q, scale: (q // 2 * 2, scale),
    wrong_scale=lambda _x, q, scale: (q, scale * 1.02),
)
def test_wrong_int8_rows_are_outside_and_plain_ones_inside(mutate, dtype):
    x_TKD = draw(64, 3, 64).to(dtype)
    q_TKD, scale_TK = quantise_kv_reference(x_TKD)
    expected = tolerance.quantised(x_TKD)
    expected.check(dequantise_kv(q_TKD, scale_TK, torch.float32))
    rejects(expected, dequantise_kv(*mutate(x_TKD, q_TKD, scale_TK), torch.float32))


# A whole model: three chains, four layers.

CONFIG = tiny_config(dim=8 * 64, num_layers=4)


@torch.inference_mode()
def logits(dtype: torch.dtype, mutate: Mutation | None = None) -> Tensor:
    """Logits of 300 tokens, computed in a dtype with weights that bf16 holds exactly."""
    tokens_BT = torch.randint(320, (1, 300), generator=torch.Generator().manual_seed(1))
    model = tiny_model(CONFIG, dtype=torch.bfloat16).to(dtype)
    if mutate is not None:
        mutate(model)
    return model(tokens_BT)


def expected_logits(dtype: torch.dtype) -> Expected:
    return tolerance.layers(logits(torch.float64), dtype, num_layers=CONFIG.num_layers, width=CONFIG.dim)


@DTYPES
def test_a_plain_model_is_inside(dtype):
    expected_logits(dtype).check(logits(dtype))


def swap_rows(model, name: str) -> None:
    parameter = model.get_parameter(name)
    parameter.copy_(swapped(parameter, 0))


def scale(model, name: str, factor: float) -> None:
    model.get_parameter(name).mul_(factor)


def rope(model) -> None:
    model.config = replace(model.config, rope_theta=model.config.rope_theta * 1.05)


MODEL_MUTATIONS = {
    "swapped features": lambda model: swap_rows(model, "layers.3.ffn.down.chain2"),
    "a dropped layer": lambda model: scale(model, "layers.1.ffn.down.chain1", 0),
    "a dropped chain": lambda model: scale(model, "head.chain3", 0),
    "a gain": lambda model: scale(model, "final_norm.chain1", 1.5),
    "scores": lambda model: scale(model, "layers.0.attention.wq.chain1", 1.5),
}
# In bf16 as large as its roundings.
IN_FP32 = {
    "a head's features swapped": lambda model: swap_rows(model, "layers.2.attention.wv.chain1"),
    "a dropped output": lambda model: model.get_parameter("layers.0.attention.wo.chain1")[5].zero_(),
    "a weight": lambda model: model.get_parameter("layers.3.ffn.up.chain3")[5, 7].zero_(),
    "rope": rope,
    "a gain by little": lambda model: scale(model, "layers.1.ffn_norm.chain2", 1.001),
    "scores by little": lambda model: scale(model, "layers.3.attention.wk.chain1", 1.001),
}


@pytest.mark.parametrize(
    ("dtype", "mutate"),
    [
        pytest.param(dtype, mutate, id=f"{name}-{dtype}")
        for dtype, several in (
            (torch.bfloat16, MODEL_MUTATIONS),
            (torch.float32, MODEL_MUTATIONS | IN_FP32),
        )
        for name, mutate in several.items()
    ],
)
def test_a_wrong_model_is_outside(mutate, dtype):
    rejects(expected_logits(dtype), logits(dtype, mutate))


def test_a_model_in_bf16_is_outside_where_fp32_is_promised():
    rejects(expected_logits(torch.float32), logits(torch.bfloat16).float())


# What every budget refuses.


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_outside(value):
    x_RI, weights, _, rows = linear_case(torch.float32)
    result = chain_linear_reference(x_RI, weights, None, rows)
    result[5, 7] = value
    rejects(tolerance.linear(x_RI, weights, None, rows), result)


def test_another_dtype_or_shape_is_outside():
    expected = tolerance.rotary(draw(5, 3, 64), *angles(5, 64))
    with pytest.raises(AssertionError, match=r"torch.float64, expected torch.float32"):
        expected.check(expected.exact)
    with pytest.raises(AssertionError, match=r"\(4, 3, 64\), expected \(5, 3, 64\)"):
        expected.check(expected.exact[1:].float())


def test_the_largest_may_only_change_places_with_one_as_large():
    exact_V = torch.tensor([1.0, 3.0, 3.0 + 1e-6, 2.0]).double()
    expected = tolerance.layers(exact_V, torch.float32, num_layers=1, width=8)
    expected.check_largest(2)
    expected.check_largest(1)
    with pytest.raises(AssertionError, match="3 was chosen, but 2 leads by"):
        expected.check_largest(3)


def test_another_order_of_float64_is_inside_and_fp32_outside():
    terms = draw(50, 300).double()
    expected = tolerance.reordered(terms.sum(dim=1))
    expected.check(terms.flip(1).cumsum(dim=1)[:, -1])
    rejects(expected, terms.bfloat16().double().sum(dim=1))
