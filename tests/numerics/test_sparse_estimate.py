"""Sums of attention weights by key, by distance and by block: every variant against explicit weights in float64.

Shapes: R rows, S keys, D head dim, B blocks.
"""

import pytest
import torch
from colm_kernels import native, sparse_estimate
from colm_kernels.sparse_estimate import SCORE_BLOCK, LastRows, block_scores
from colm_kernels.steps import all_at_once
from torch import Tensor

VARIANTS = native.available_variants()
SHAPES = [(1, 1), (1, 64), (3, 65), (64, 64), (64, 1024), (64, 1025), (49, 2100)]
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 1e-5}
"""Inputs are exact in either dtype; what differs is products, sums and exponentials in fp32."""


def inputs(num_rows: int, num_keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows + num_keys)
    q_RD, k_SD = (torch.randn(n, 64, generator=generator).to(torch.bfloat16) for n in (num_rows, num_keys))
    return q_RD.to(dtype), k_SD.to(dtype)


def scores_of(q_RD: Tensor, k_SD: Tensor, position_R: Tensor) -> Tensor:
    scores_RS = q_RD.double() @ k_SD.double().T / q_RD.shape[1] ** 0.5
    return scores_RS.masked_fill(torch.arange(len(k_SD)) > position_R.unsqueeze(1), float("-inf"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "num_keys"), SHAPES)
def test_last_rows_are_added_up_by_key_and_by_distance(
    variant: native.Variant, dtype: torch.dtype, num_rows: int, num_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_estimate, "SCORES_AT_ONCE", 1024 * num_rows)
    q_RD, k_SD = inputs(num_rows, num_keys, dtype)
    with native.use_variant(variant):
        rows = LastRows(q_RD, k_SD)
        all_at_once(rows.normalise())
        vertical_S, diagonal_X = all_at_once(rows.masses())
        own_S, own_X = vertical_S + 1e-3, diagonal_X + 1e-3
        by_key_S, by_diagonal_X = all_at_once(rows.quotients(own_S, own_X, num_first=3, num_nearest=2))
    position_R = torch.arange(num_keys - 1, num_keys - 1 - num_rows, -1)
    weights_RS = scores_of(q_RD.flip(0), k_SD, position_R).softmax(dim=1)
    number_RS = torch.arange(num_rows).unsqueeze(1) + torch.arange(num_keys)

    def check(found: tuple[Tensor, Tensor], expected_RS: Tensor) -> None:
        by_diagonal = torch.zeros(num_keys + num_rows, dtype=torch.float64)
        by_diagonal.scatter_add_(0, number_RS.flatten(), expected_RS.flatten())
        for ours, exact in zip(found, (expected_RS.sum(dim=0), by_diagonal), strict=True):
            assert ((ours - exact).abs() <= RELATIVE[dtype] * (exact + 1e-6)).all()

    check((vertical_S, diagonal_X), weights_RS)
    distance_RS = num_keys - 1 - number_RS
    rest_RS = weights_RS.masked_fill((torch.arange(num_keys) < 3) | (distance_RS < 2), 0.0)
    check((by_key_S, by_diagonal_X), rest_RS / (own_S.double() + own_X.double()[number_RS]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("begin", "end"), [(0, 300), (64, 300), (128, 192)])
def test_blocks_have_each_rows_maximum_and_sum(
    variant: native.Variant, dtype: torch.dtype, begin: int, end: int
) -> None:
    """Of rows anywhere, some of which see nothing of a block."""
    q_RD, k_SD = inputs(101, 300, dtype)
    position_R = torch.randint(300, (101,), generator=torch.Generator().manual_seed(0)).sort(descending=True).values
    with native.use_variant(variant):
        maximum_RB, sum_RB = block_scores(q_RD, k_SD, position_R, begin, end)
    scores_RS = scores_of(q_RD, k_SD, position_R)
    for block, first in enumerate(range(begin, end, SCORE_BLOCK)):
        exact_R = scores_RS[:, first : min(first + SCORE_BLOCK, end)].exp().sum(dim=1)
        found_R = maximum_RB[:, block].double().exp() * sum_RB[:, block]
        assert ((found_R - exact_R).abs() <= RELATIVE[dtype] * exact_R).all()
