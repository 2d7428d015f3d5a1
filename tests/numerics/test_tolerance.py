"""The budgets of models, and what no budget lets pass: a plain model is inside, a faulty one is not."""

from dataclasses import replace

import pytest
import torch
from colm_kernels import tolerance
from colm_kernels.chain_linear import chain_linear_reference
from colm_kernels.tolerance import Expected
from torch import Tensor

from tests.spoilt_results import DTYPES, Mutation, angles, draw, linear_case, rejects, swapped
from tests.tiny import tiny_config, tiny_model

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
