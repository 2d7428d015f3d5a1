"""How far arithmetic may be off: the one place for such numbers.

The rule: max|ours - reference| <= 2 * max|eager - reference| + floor(dtype), where `reference` is computed in
a wider dtype and `eager` is plain PyTorch (or another trusted implementation) in our dtype. Twice, because
ours sums in another order; the floor, because eager may hit the reference exactly where little is summed.
"""

import torch
from torch import Tensor

EAGER_FACTOR = 2.0
FLOOR_ULPS = 2.0
"""Rounding steps of the largest reference value that are allowed even where eager is exact."""


def floor(dtype: torch.dtype, reference: Tensor) -> float:
    """Rounding steps of `dtype` at the reference's largest magnitude."""
    largest = reference.abs().max().item() if reference.numel() else 0.0
    return FLOOR_ULPS * torch.finfo(dtype).eps * largest


def max_error(result: Tensor, reference: Tensor) -> float:
    """Largest absolute difference, taken in float64; NaN where either holds one, which no budget admits."""
    return (result.double() - reference.double()).abs().max().item() if reference.numel() else 0.0


def budget(eager: Tensor, reference: Tensor) -> float:
    """The error that a result in eager's dtype may have; see the rule above."""
    return EAGER_FACTOR * max_error(eager, reference) + floor(eager.dtype, reference)


def assert_within_budget(result: Tensor, eager: Tensor, reference: Tensor) -> None:
    """Hold a result against the rule.

    Args:
        result: what is tested, in the dtype under test.
        eager: the same by a trusted implementation in the same dtype.
        reference: the same in a wider dtype, with the same inputs.

    Raises:
        AssertionError: shapes or dtypes differ, or the error is over the budget; with both figures.
    """
    assert result.shape == eager.shape == reference.shape, (result.shape, eager.shape, reference.shape)
    assert result.dtype == eager.dtype, (result.dtype, eager.dtype)
    error, allowed = max_error(result, reference), budget(eager, reference)
    assert error <= allowed, f"max error {error:.3e} is over the budget {allowed:.3e} of {result.dtype}"


ATTENTION_TERM_ULPS = 4.0
"""Roundings that each weighted value goes through before it is summed: score, exponential, weight, product."""


def assert_attention_within_budget(result: Tensor, eager: Tensor, reference: Tensor, magnitude: Tensor) -> None:
    """Hold an attention's output against the rule, with a floor of the size of what is summed.

    Values of both signs cancel, the more the longer the context, and leave their rounding behind: it is relative to
    the terms, not to what is left of them.

    Args:
        result: what is tested, in the dtype under test.
        eager: the same by a trusted implementation in the same dtype.
        reference: the same in a wider dtype.
        magnitude: the reference with the values' absolute values.

    Raises:
        AssertionError: shapes or dtypes differ, or the error is over the budget; with both figures.
    """
    assert result.shape == eager.shape == reference.shape, (result.shape, eager.shape, reference.shape)
    assert result.dtype == eager.dtype, (result.dtype, eager.dtype)
    terms = ATTENTION_TERM_ULPS * torch.finfo(torch.float32).eps * magnitude.abs().max().item()
    error, allowed = max_error(result, reference), budget(eager, reference) + terms
    assert error <= allowed, f"max error {error:.3e} is over the budget {allowed:.3e} of {result.dtype}"


EXP_ERROR = {torch.float32: 7.5e-8, torch.float16: 7.5e-8, torch.bfloat16: 2.6e-6}
"""Relative error of the attention kernels' exponential, by dtype of their inputs: what it adds to a log-sum-exp."""


def assert_lse_within_budget(dtype: torch.dtype, lse: Tensor, eager: Tensor, reference: Tensor) -> None:
    """Hold a log-sum-exp in fp32 against the rule, the exponential's error being the absolute floor.

    Args:
        dtype: of the queries and keys it was computed from.
        lse: what is tested.
        eager: the same in fp32 by a trusted implementation.
        reference: the same in float64.

    Raises:
        AssertionError: shapes differ, or the error is over the budget; with both figures.
    """
    assert lse.shape == eager.shape == reference.shape, (lse.shape, eager.shape, reference.shape)
    error, allowed = max_error(lse, reference), budget(eager, reference) + EXP_ERROR[dtype]
    assert error <= allowed, f"max error {error:.3e} is over the budget {allowed:.3e} of a log-sum-exp"
