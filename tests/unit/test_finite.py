"""NaN and infinities are found wherever they stand, in every dtype that weights, keys and values have."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colm.finite import bytes_are_finite, is_finite


def by_bytes(tensor: torch.Tensor) -> bool:
    return bytes_are_finite(tensor.flatten().view(torch.uint8).numpy().data.cast("B"), tensor.dtype)


LOOKS = pytest.mark.parametrize("look", [is_finite, by_bytes])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@LOOKS
@DTYPES
@given(
    num_rows=st.integers(1, 9),
    num_columns=st.integers(1, 131),
    value=st.sampled_from(["nan", "inf", "-inf"]),
    data=st.data(),
)
def test_one_is_found_wherever_it_stands(
    look: Callable[[torch.Tensor], bool],
    dtype: torch.dtype,
    num_rows: int,
    num_columns: int,
    value: str,
    data: st.DataObject,
) -> None:
    tensor = torch.randn(num_rows, num_columns).to(dtype)
    assert look(tensor)
    place = data.draw(st.integers(0, tensor.numel() - 1))
    tensor.view(-1)[place] = float(value)
    assert not look(tensor)
    assert not place or look(tensor.view(-1)[:place])
    assert not look(tensor.T)


@LOOKS
@DTYPES
def test_the_largest_numbers_are_finite(look: Callable[[torch.Tensor], bool], dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    assert look(torch.tensor([limits.max, limits.min, -0.0, limits.tiny], dtype=dtype))
