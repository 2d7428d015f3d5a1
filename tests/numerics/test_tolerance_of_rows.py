"""The budgets of what works row by row bite: norms, rotations, SwiGLU, int8."""

import torch
from colm_kernels import tolerance
from colm_kernels.kv_quantise import dequantise_kv, quantise_kv_reference
from colm_kernels.rms_norm import rms_norm_reference
from colm_kernels.rotary import rotate_reference
from colm_kernels.swiglu import swiglu_reference
from torch import Tensor

from tests.kernel_inputs import staircase_inputs
from tests.spoilt_results import (
    DTYPES,
    EPS,
    ROWS,
    accumulated,
    angles,
    draw,
    mutations,
    rejects,
    swapped,
    without,
    without_one,
)


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
