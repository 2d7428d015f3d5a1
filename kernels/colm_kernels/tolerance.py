"""Error budgets of all arithmetic: the one place for such numbers.

Every element of a result is compared with the exact one, computed in float64 from the same rounded inputs:

    |result - exact| <= roundings * u(result's dtype) * |exact|  +  steps(n) * u(fp32) * sum|terms|

u is the unit roundoff, n the number of terms of a sum. No budget depends on another implementation's error, so it is
the same on every machine and for every order in which a library sums.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from colm_kernels.chain_linear import chain_linear_reference
from colm_kernels.decode_attention import decode_attention_reference
from colm_kernels.kv_quantise import LARGEST
from colm_kernels.prefill_attention import prefill_attention_reference
from colm_kernels.quantised import QuantisedPanels
from colm_kernels.rms_norm import rms_norm_reference
from colm_kernels.rotary import rotate_reference
from colm_kernels.sparse_index import SparseIndex
from colm_kernels.sparse_prefill_attention import sparse_prefill_attention_reference
from colm_kernels.staircase import LaidOut, Staircase, Weights, as_rows
from colm_kernels.swiglu import swiglu_reference

SUM_STEPS = 2.0
"""A sum of n terms may be off by SUM_STEPS * sqrt(n + 1) * u times the sum of their magnitudes.

The worst order adds one term after the other; the worst signs are all the same. Each rounding is then uniform within u
times a partial sum, and the partial sums grow like 1 .. n. One standard deviation of the total error is
sqrt(n) / 3 * u times the sum; the constant allows six. Up to n = 3 the budget is no less than the certain bound,
(n + 1) * u.
"""

SCORE_STEPS = 4.0
"""Roundings of an exponent, each relative to the row's largest score. One each: the factor (scale times log2(e)), its
products with score and maximum, and their difference."""

QUERY_STEPS = {torch.float32: 3.1, torch.bfloat16: 260.2}
"""Of a query feature that multiplies int8 keys, in u times the query's largest, by the query's dtype. The library
writes it in units of 2 u * 128 / 127 times that, or 256 times as much of bf16: the rounding to a whole number may be
off by half a unit, factor and product by u each."""

WEIGHT_STEPS = {torch.float32: 3.6, torch.bfloat16: 259.1}
"""Of a weight times its value's scale, where values are int8, in u times the largest of a block of `WEIGHT_BLOCK`
tokens, by the query's dtype: half of a unit, and u each for product, factor and their product. The unit is
2 u * 128 / 255, or 256 times as much of bf16; with AVX2 alone bf16 has 15 bits, a unit of 2**24 / 32767 u."""

WEIGHT_BLOCK = 64

EXP_ERROR, CUBIC_EXP_ERROR = 2.6e-6, 2e-4
"""Relative errors of exponentials.

The library's is 1.41e-7, or 2.6e-6 for 16-bit tensors (vec_*.h). PyTorch's is 20 ulp, 2.4e-6; SDPA of 16 bits uses a
cubic polynomial.
"""

VANISHED = 2.0**-149
"""The smallest number above zero in fp32: a softmax weight, relative to the row's largest, that is below it is zero."""

SIGMAS = 6.0
"""Factor on u * sqrt(sum terms^2), the spread of a sum of independent roundings. More than this factor happens at most
once in 10^7 sums (Hoeffding's bound)."""

NORM_STEPS = 4.0
"""Roundings after the sum of squares: quotient, square root, reciprocal, product. The root halves the sum's error."""

GATE_STEPS = 4.0
"""Roundings around the exponential of SwiGLU: a sum, a quotient and two products."""

SILU_SLOPE = 1.1
"""Largest derivative of silu, rounded up."""

LAYER_ROUNDINGS, LAYER_SUMS = 14.0, 3.0
"""The error that a layer adds, relative to the largest element: roundings of its dtype, and sums over its width.

Fourteen results are rounded one after the other, each with an error of u / sqrt(3) times the RMS. Five products that
sum one term after the other have an error of 0.4 sqrt(n) u times the RMS. The constants allow six standard deviations
of both.
"""


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest error of one rounding to nearest, relative to the rounded number."""
    return torch.finfo(dtype).eps / 2


def sum_error(num_terms: int) -> float:
    """Largest error of a sum in fp32, in any order, relative to the sum of its terms' magnitudes."""
    return SUM_STEPS * math.sqrt(num_terms + 1) * unit_roundoff(torch.float32)


@dataclass(frozen=True)
class Expected:
    """The exact result of an operation and its error budget.

    Args:
        exact: the result in float64.
        allowed: largest error of each element.
        dtype: the dtype that a result must have.
    """

    exact: Tensor
    allowed: Tensor
    dtype: torch.dtype

    def check(self, result: Tensor) -> None:
        """Check a result, element by element.

        Raises:
            AssertionError: another shape or dtype, an element off by more than its budget, or NaN.
        """
        assert result.dtype == self.dtype, f"{result.dtype}, expected {self.dtype}"
        assert result.shape == self.exact.shape, f"{tuple(result.shape)}, expected {tuple(self.exact.shape)}"
        error = (result.detach().double() - self.exact).abs()
        over = ~(error <= self.allowed)  # NaN is over any budget
        if over.any():
            worst = (error / self.allowed).nan_to_num(torch.inf).where(over, 0).argmax()
            at = tuple(int(i) for i in torch.unravel_index(worst, error.shape))
            raise AssertionError(
                f"{int(over.sum())} of {over.numel()} elements are over their budget, the worst at {at}: "
                f"{float(result[at])!r}, expected {float(self.exact[at])!r} within {float(self.allowed[at]):.3e}"
            )

    def check_largest(self, index: int) -> None:
        """Check the index of a one-dimensional result's largest element.

        Raises:
            AssertionError: another element is larger by more than the budgets of the two together.
        """
        best = int(self.exact.argmax())
        lead, allowed = float(self.exact[best] - self.exact[index]), float(self.allowed[best] + self.allowed[index])
        assert lead <= allowed, f"{index} was chosen, but {best} leads by {lead:.3e}, over {allowed:.3e}"


def check_all(expected: Iterable[Expected], results: Iterable[Tensor]) -> None:
    """Check several results, one against each expectation; raises as `Expected.check` does."""
    for of_result, result in zip(expected, results, strict=True):
        of_result.check(result)


def _rounded(exact: Tensor, error: Tensor | float, dtype: torch.dtype, roundings: float = 1) -> Expected:
    """Budget of an error plus the rounding of the result, which may turn a subnormal number into zero."""
    info = torch.finfo(dtype)
    smallest = info.tiny * (info.eps if dtype == torch.float16 else 1)
    return Expected(exact, roundings * unit_roundoff(dtype) * exact.abs() + error + smallest, dtype)


Tensors = Sequence[Tensor]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def linear(x_RI: Tensor, weights: Weights, biases: Tensors | None, chain_rows: Sequence[int]) -> Expected:
    """Budget of `chain_linear`: sums in fp32, rounded once.

    A quantised weight is two terms, of its whole number less 8 and of all that its group has in common.
    """

    def run(of: Callable[[Tensor], Tensor], of_weight: Callable[[Tensor | LaidOut], Tensor]) -> Tensor:
        x, _, bs = _wide(of, x_RI, [], biases)
        return chain_linear_reference(x, [of_weight(weight) for weight in weights], bs, chain_rows)

    is_quantised = any(isinstance(weight, QuantisedPanels) for weight in weights)
    num_terms = x_RI.shape[1] * (2 if is_quantised else 1)
    return _rounded(run(_same, _exact), sum_error(num_terms) * run(torch.abs, _magnitude), x_RI.dtype)


def _exact(weight: Tensor | LaidOut) -> Tensor:
    if isinstance(weight, QuantisedPanels):
        return weight.blocks().weight()
    return as_rows([weight])[0].detach().double()


def _magnitude(weight: Tensor | LaidOut) -> Tensor:
    """Of the terms that are added up for a weight."""
    if not isinstance(weight, QuantisedPanels) or (blocks := weight.blocks()).minimum_OG is None:
        return _exact(weight).abs()
    common_OG = blocks.minimum_OG.double() + 8 * blocks.scale_OG.double()
    common_OI = common_OG.repeat_interleave(weight.shape[1] // common_OG.shape[1], dim=1)
    return (_exact(weight) - common_OI).abs() + common_OI.abs()


def linear_gradients(
    x_RI: Tensor, weights: Tensors, biases: Tensors | None, chain_rows: Sequence[int], grad_RO: Tensor
) -> list[Expected]:
    """Budgets of the gradients of x, of every weight and of every bias, in this order.

    Each gradient is rounded once, except that of x: it is rounded once for every chain that is added to it.
    """
    dtype, (num_rows, num_outputs) = x_RI.dtype, grad_RO.shape

    def run(of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x, ws, bs = _wide(of, x_RI, weights, biases)
        leaves = [leaf.requires_grad_() for leaf in (x, *ws, *(bs or ()))]
        with torch.enable_grad():
            y = chain_linear_reference(x, ws, bs, chain_rows)
        return list(torch.autograd.grad(y, leaves, of(grad_RO.double())))

    exact, terms = run(_same), run(torch.abs)
    gathered_RI = torch.zeros_like(exact[0])
    steps = grad_RO.double().split([len(weight) for weight in weights], dim=1)
    for step_RO, weight, rows in zip(steps, weights, chain_rows, strict=True):
        gathered_RI[:rows, : weight.shape[1]] += (step_RO[:rows] @ weight.detach().double()).abs()
    rounded_RI = len(weights) * unit_roundoff(dtype) * gathered_RI
    of_x = _rounded(exact[0], sum_error(num_outputs) * terms[0] + rounded_RI, dtype, roundings=0)
    return [of_x, *(_rounded(e, sum_error(num_rows) * t, dtype) for e, t in zip(exact[1:], terms[1:], strict=True))]


def _wide(
    of: Callable[[Tensor], Tensor], x: Tensor, weights: Tensors, biases: Tensors | None
) -> tuple[Tensor, list[Tensor], list[Tensor] | None]:
    def widen(tensor: Tensor) -> Tensor:
        return of(tensor.detach().double())

    return widen(x), [widen(weight) for weight in weights], None if biases is None else [widen(b) for b in biases]


def prefill_attention(
    q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, index: SparseIndex | None = None
) -> tuple[Expected, Expected]:
    """Budgets of output and log-sum-exp, dense or over an index; weights may be rounded to the inputs' dtype."""
    num_queries, num_heads, _ = q_THD.shape
    num_keys = k_KSD.shape[1]
    wide = (q_THD.double(), k_KSD.double(), v_KSD.double())
    if index is None:
        exact, exact_lse = prefill_attention_reference(*wide)
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    else:
        exact, exact_lse = sparse_prefill_attention_reference(*wide, index)
        seen = index.mask().repeat_interleave(num_heads // index.num_lists, dim=0)
    dtype = q_THD.dtype
    exp_error = EXP_ERROR if dtype == torch.float32 else CUBIC_EXP_ERROR
    error, lse_error = _attention_errors(*wide, seen, exp_error, weights_dtype=dtype)
    lse_error = lse_error + unit_roundoff(torch.float32) * exact_lse.abs()  # the logarithm's rounding
    return _rounded(exact, error, dtype), _rounded(exact_lse, lse_error, torch.float32)


def recall(q_THD: Tensor, k_KSD: Tensor, index: SparseIndex) -> Expected:
    """Of exp(lse over what an index lists - lse over all), in float64, both from scores in fp32."""
    (_, listed), (_, dense) = (prefill_attention(q_THD, k_KSD, k_KSD, of) for of in (index, None))
    exact = (listed.exact - dense.exact).exp()
    return Expected(exact, exact * torch.expm1(listed.allowed + dense.allowed), torch.float64)


def decode_attention(
    q_TKGD: Tensor,
    k_pages_BPKD: Tensor,
    v_pages_BPKD: Tensor,
    block_table_RM: Tensor,
    context_lens_R: Tensor,
    *,
    cu_seqlens_q_R1: Tensor | None = None,
    k_scales_BPK: Tensor | None = None,
    v_scales_BPK: Tensor | None = None,
    weights_dtype: torch.dtype = torch.float32,
) -> Expected:
    """Budget of `decode_attention`, from its arguments. A GPU rounds the weights to `weights_dtype`."""

    def widen(pages: Tensor, scales: Tensor | None) -> Tensor:
        return pages.double() if scales is None else pages.double() * scales.double().unsqueeze(-1)

    q, dtype, page_tokens = q_TKGD.double(), q_TKGD.dtype, k_pages_BPKD.shape[1]
    k_pages, v_pages = widen(k_pages_BPKD, k_scales_BPK), widen(v_pages_BPKD, v_scales_BPK)
    bounds = range(len(q) + 1) if cu_seqlens_q_R1 is None else cu_seqlens_q_R1.tolist()
    table = (block_table_RM, context_lens_R)
    exact = decode_attention_reference(q, k_pages, v_pages, *table, cu_seqlens_q_R1=cu_seqlens_q_R1)
    error = torch.zeros_like(exact)
    for request, context_len in enumerate(context_lens_R.tolist()):
        page_ids = block_table_RM[request, : -(-context_len // page_tokens)].long()
        k_KSD, v_KSD = (pages[page_ids].flatten(0, 1).transpose(0, 1) for pages in (k_pages, v_pages))
        for query in range(*bounds[request : request + 2]):
            past = slice(context_len - (bounds[request + 1] - 1 - query))
            heads, seen = q[query].flatten(0, 1)[None], torch.tensor(True)
            keys_values = k_KSD[:, past], v_KSD[:, past]
            values = None
            if v_scales_BPK is not None:
                of_tokens = (pages[page_ids].flatten(0, 1).transpose(0, 1) for pages in (v_pages_BPKD, v_scales_BPK))
                values = _Int8Values(dtype, *(each[:, past].double() for each in of_tokens))
            of_heads, _ = _attention_errors(heads, *keys_values, seen, EXP_ERROR, weights_dtype, values)
            error[query] = of_heads[0].view_as(error[query])
    return _rounded(exact, error, dtype)


def _of_dtype(steps: dict[torch.dtype, float], dtype: torch.dtype) -> float:
    return steps.get(dtype, steps[torch.float32])


@dataclass(frozen=True)
class _Int8Values:
    """Values in int8, as a query of some dtype meets them."""

    query_dtype: torch.dtype
    codes_KSD: Tensor
    scales_KS: Tensor

    def weight_errors(self, p_HTS: Tensor) -> Tensor:
        """What the digits of the weights, block by block, may add to the output: error_HTD."""
        num_groups, last = len(p_HTS) // len(self.codes_KSD), -p_HTS.shape[2] % WEIGHT_BLOCK
        of_groups = (self.scales_KS, self.codes_KSD.abs())
        scales_HS, sizes_HSD = (each.repeat_interleave(num_groups, dim=0) for each in of_groups)
        weights_HTS = F.pad(p_HTS * scales_HS.abs().unsqueeze(1), (0, last))
        largest_HTB = weights_HTS.unflatten(2, (-1, WEIGHT_BLOCK)).amax(dim=3)
        sizes_HBD = F.pad(sizes_HSD, (0, 0, 0, last)).unflatten(1, (-1, WEIGHT_BLOCK)).sum(dim=2)
        step: float = _of_dtype(WEIGHT_STEPS, self.query_dtype) * unit_roundoff(torch.float32)
        error_HTD: Tensor = largest_HTB @ sizes_HBD * step
        return error_HTD


def _attention_errors(
    q_THD: Tensor,
    k_KSD: Tensor,
    v_KSD: Tensor,
    seen_TS: Tensor,
    exp_error: float,
    weights_dtype: torch.dtype,
    int8_values: _Int8Values | None = None,
) -> tuple[Tensor, Tensor]:
    """Errors of the output before it is rounded, and of the log-sum-exp.

    A weight p_j has the relative error e_j: the error of its score, as an exponent, plus that of the exponential. After
    normalisation the sum of p_j v_j has the error sum p_j (e_j - sum_i p_i e_i) v_j, which is zero where one key has
    all the weight.
    """
    num_heads, head_dim = q_THD.shape[1:]
    k_HSD, v_HSD = (tensor.repeat_interleave(num_heads // len(tensor), dim=0) for tensor in (k_KSD, v_KSD))
    q_HTD = q_THD.transpose(0, 1) * head_dim**-0.5
    p_HTS = (q_HTD @ k_HSD.mT).masked_fill(~seen_TS, -torch.inf).softmax(dim=-1)
    # A weight that is zero in fp32 is no term of a sum, and no error of its score shows.
    weighs_HTS = p_HTS > VANISHED * p_HTS.amax(dim=-1, keepdim=True)
    num_terms_HT1 = weighs_HTS.sum(dim=-1, keepdim=True, dtype=torch.float64)
    of_sum_HT1 = sum_error(0) * (num_terms_HT1 + 1).sqrt()
    size_HTS = (q_HTD.abs() @ k_HSD.abs().mT).where(weighs_HTS, 0)
    largest_HT1 = size_HTS.amax(dim=-1, keepdim=True)
    u = unit_roundoff(torch.float32)
    e_HTS = sum_error(head_dim) * size_HTS + SCORE_STEPS * u * largest_HT1 + exp_error
    if int8_values is not None:
        of_query_HT1 = _of_dtype(QUERY_STEPS, int8_values.query_dtype) * u * q_HTD.abs().amax(dim=-1, keepdim=True)
        e_HTS += of_query_HT1 * k_HSD.abs().sum(dim=-1).unsqueeze(1).where(weighs_HTS, 0)
    mean_HT1 = (p_HTS * e_HTS).sum(dim=-1, keepdim=True)
    v_HSD = v_HSD.abs()
    # The sums of numerator and denominator.
    of_sums = 2 * of_sum_HT1 * (p_HTS @ v_HSD)
    error_HTD = (p_HTS * ((1 - 2 * p_HTS) * e_HTS + mean_HT1)) @ v_HSD + of_sums
    if int8_values is not None:
        error_HTD += int8_values.weight_errors(p_HTS)
    if weights_dtype != torch.float32:
        # Roundings of the weights, and of SDPA's outputs over prefix and tile before they are joined.
        at_random, at_most = SIGMAS * (p_HTS.square() @ v_HSD.square()).sqrt(), 2 * (p_HTS @ v_HSD)
        error_HTD += unit_roundoff(weights_dtype) * at_random.minimum(at_most)
    lse_error_HT = (mean_HT1 + of_sum_HT1).squeeze(-1)
    return error_HTD.transpose(0, 1), lse_error_HT.T


def rms_norm(x_RD: Tensor, gains: Tensors, eps: float) -> Expected:
    """Budget of `rms_norm`, which rounds before the gain and after it."""
    exact = rms_norm_reference(x_RD.double(), [gain.double() for gain in gains], eps)
    widths = [len(gain) for gain in gains]
    relative = [sum_error(width) / 2 + NORM_STEPS * unit_roundoff(torch.float32) for width in widths]
    error_D = torch.tensor(relative, dtype=torch.float64).repeat_interleave(torch.tensor(widths))
    return _rounded(exact, error_D * exact.abs(), x_RD.dtype, roundings=2)


def rotary(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Expected:
    """Budget of `rotate_`: sums of two products."""
    exact = rotate_reference(x_TND.double(), cos_TD.double(), sin_TD.double())
    first, second = x_TND.double().abs().chunk(2, dim=-1)
    cos, sin = (table.double().abs()[:, None, : first.shape[-1]] for table in (cos_TD, sin_TD))
    terms = torch.cat((first * cos + second * sin, second * cos + first * sin), dim=-1)
    return _rounded(exact, sum_error(2) * terms, x_TND.dtype)


def swiglu(gate_RF: Tensor, up_RF: Tensor) -> Expected:
    """Budget of `swiglu_`, two roundings of the result: PyTorch's path rounds silu(gate) and the product.

    The exponent -gate is rounded twice. A relative error of exp(-gate) becomes one of silu(gate), times sigmoid(-gate).
    A subnormal exponential may become zero.
    """
    gate, up = gate_RF.double(), up_RF.double()
    exact, u = swiglu_reference(gate, up), unit_roundoff(torch.float32)
    relative = (2 * u * gate.abs() + EXP_ERROR) * torch.sigmoid(-gate) + GATE_STEPS * u
    vanished = torch.finfo(torch.float32).tiny * gate.abs() * up.abs()
    return _rounded(exact, relative * exact.abs() + vanished, gate_RF.dtype, roundings=2)


def swiglu_linear(x_RI: Tensor, gate: Staircase, up: Staircase) -> Expected:
    """Budget of `swiglu_linear`: both products may be rounded, and the result twice, as `swiglu_` does it."""
    gates, ups = linear(x_RI, *gate), linear(x_RI, *up)
    product = swiglu(gates.exact, ups.exact)
    error = SILU_SLOPE * gates.allowed * (ups.exact.abs() + ups.allowed)
    error += swiglu_reference(gates.exact, torch.ones_like(ups.exact)).abs() * ups.allowed
    return _rounded(product.exact, error + product.allowed, x_RI.dtype, roundings=2)


def layers(exact: Tensor, dtype: torch.dtype, *, num_layers: int, width: int) -> Expected:
    """Budget of a model's logits, keys or values, or of a single layer, relative to the largest of the last dimension.

    A bound through every operation would multiply their worst cases and admit anything. The layers' errors add up in
    the residual stream like independent ones, so the budget grows with the root of the number of layers.

    Args:
        exact: the result in float64.
        dtype: dtype of weights and activations.
        num_layers: layers before the result.
        width: the model's dim.
    """
    relative = LAYER_ROUNDINGS * unit_roundoff(dtype) + LAYER_SUMS * sum_error(width)
    largest = exact.abs().amax(dim=-1, keepdim=True)
    return Expected(exact, (math.sqrt(num_layers + 1) * relative * largest).expand_as(exact), dtype)


def reordered(exact: Tensor) -> Expected:
    """Budget of a float64 computation that sums in another order: one fp32 rounding of the largest element."""
    return Expected(exact, (unit_roundoff(torch.float32) * exact.abs().max()).expand_as(exact), torch.float64)


def quantised(x_TKD: Tensor) -> Expected:
    """Budget of `quantise_kv`, dequantised in fp32: half a scale of largest magnitude / 127, rounded up to bf16."""
    exact = x_TKD.double()
    scale_TK1 = exact.abs().amax(dim=-1, keepdim=True) / LARGEST * (1 + torch.finfo(torch.bfloat16).eps)
    quotient = LARGEST * unit_roundoff(torch.float32)
    return _rounded(exact, (scale_TK1 * (0.5 + quotient)).expand_as(exact), torch.float32)
