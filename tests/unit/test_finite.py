"""NaN and infinities are found wherever they stand, in every dtype that weights, keys and values have."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colm.finite import is_finite

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@DTYPES
@given(
    num_rows=st.integers(1, 9),
    num_columns=st.integers(1, 131),
    value=st.sampled_from(["nan", "inf", "-inf"]),
    data=st.data(),
)
def test_one_is_found_wherever_it_stands(
    dtype: torch.dtype,
    num_rows: int,
    num_columns: int,
    value: str,
    data: st.DataObject,
) -> None:
    tensor = torch.randn(num_rows, num_columns).to(dtype)
    assert is_finite(tensor)
    place = data.draw(st.integers(0, tensor.numel() - 1))
    tensor.view(-1)[place] = float(value)
    assert not is_finite(tensor)
    assert not place or is_finite(tensor.view(-1)[:place])
    assert not is_finite(tensor.T)


@DTYPES
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    assert is_finite(torch.tensor([limits.max, limits.min, -0.0, limits.tiny], dtype=dtype))
