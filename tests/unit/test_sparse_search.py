"""The search for patterns: budgets are kept, planted heads get theirs, and the layers are the model's own.

Shapes: N tokens, H query heads, K kv heads, E head dim.
"""

from typing import Any

import numpy as np
import pytest
import torch
from colm_kernels import tolerance
from colm_kernels.prefill_attention import prefill_attention, prefill_attention_reference
from colm_kernels.steps import all_at_once
from torch import Tensor

from colm.errors import ConfigError
from prefill_node.sparse.layers import LayerAttention, layer_attentions
from prefill_node.sparse.patterns import AShape, BlockSparse, HeadPattern, PatternFile, VerticalSlash
from prefill_node.sparse.planner import ESTIMATION_ROWS, SparsePlanner
from prefill_node.sparse.policy import SparsePolicy
from prefill_node.sparse.search import SearchOptions, search_layer, search_patterns
from tests.kernel_inputs import prefill_inputs
from tests.tiny import tiny_config, tiny_model

NUM_TOKENS, HEAD_DIM = 1536, 16
BARE = SparsePolicy(sink_tokens=0, local_tokens=1, last_rows_dense=0, dense_below_tokens=0)


def options(**values: Any) -> SearchOptions:
    return SearchOptions(**({"policy": BARE, "budget": 0.25} | values))


def planted() -> LayerAttention:
    """Head 0 looks at scattered keys, head 1 at what stands 700 tokens back, head 2 at the nearest, head 3 nowhere."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = prefill_inputs(NUM_TOKENS, NUM_TOKENS, 4, 4, HEAD_DIM, torch.float32)
    q, k = 0.01 * q, 0.01 * k
    needles = torch.randperm(NUM_TOKENS // 2, generator=generator)[:40]
    q[:, 0, 0], k[0, needles, 0] = 8.0, 8.0
    marks = torch.nn.functional.normalize(torch.randn(NUM_TOKENS, HEAD_DIM, generator=generator), dim=1) * 10
    k[1], q[700:, 1] = marks, marks[:-700]
    turn = torch.arange(NUM_TOKENS) / 30
    for x in (k[2], q[:, 2]):
        x[:, 0], x[:, 1] = 12 * turn.cos(), 12 * turn.sin()
    k[2, :, 2] = 0.05 * torch.arange(NUM_TOKENS)
    q[:, 2, 2] = 4.0
    return LayerAttention(q, k, v, *prefill_attention(q, k, v))


def density(pattern: HeadPattern, attention: LayerAttention, head: int) -> float:
    """Of the head's index, as the planner that serves makes it."""

    config = tiny_config(chains=(1,), num_kv_heads=1, num_layers=1)
    q, k = attention.q_NHE[:, head : head + 1], attention.k_KNE[head : head + 1]
    plan = all_at_once(SparsePlanner(config, BARE, PatternFile(((pattern,),))).plan(0, q[-ESTIMATION_ROWS:], k))
    assert plan is not None
    return plan.index(0, q).density()


@pytest.mark.parametrize("objective", ["mass", "output"])
@pytest.mark.parametrize("budget", [0.3, 0.4])
def test_planted_heads_get_their_pattern(objective, budget):
    attention = planted()
    found = search_layer(attention, options(objective=objective, budget=budget))
    of_needles, of_echo, of_nearest, _ = found
    assert isinstance(of_needles, VerticalSlash)
    assert of_needles.num_verticals >= 40
    assert not isinstance(of_echo, AShape)
    assert of_echo.score > 0.7  # its first 700 rows have nothing to look at
    assert of_needles.score > 0.95
    assert of_nearest.score > 0.9


@pytest.mark.parametrize("budget", [0.2, 0.3])
def test_no_pattern_is_over_the_budget(budget):
    """With the smaller one, one column and one diagonal are too much already."""
    attention = planted()
    for head, pattern in enumerate(search_layer(attention, options(budget=budget))):
        assert density(pattern, attention, head) <= budget


def test_one_more_would_not_fit():
    attention = planted()
    for head, pattern in enumerate(search_layer(attention, options(budget=0.3))):
        match pattern:
            case AShape():
                more: HeadPattern = AShape(
                    sink_tokens=pattern.sink_tokens + 128, local_tokens=pattern.local_tokens + 128
                )
            case VerticalSlash():
                more = VerticalSlash(num_verticals=pattern.num_verticals + 64, num_slashes=pattern.num_slashes + 64)
            case BlockSparse():
                more = BlockSparse(num_blocks=pattern.num_blocks + 1)
        assert density(more, attention, head) > 0.3


def test_the_score_is_the_recalled_share():
    """Of the whole text's rows, by the plan that serves, from explicit weights."""
    attention = planted()
    found = search_layer(attention, options())
    q, k = attention.q_NHE.double().transpose(0, 1), attention.k_KNE.double()
    future = torch.ones(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).triu(1)
    weights_HNN = (q @ k.mT / HEAD_DIM**0.5).masked_fill(future, float("-inf")).softmax(dim=2)

    planner = SparsePlanner(tiny_config(chains=(4,), num_kv_heads=4, num_layers=1), BARE, PatternFile((found,)))
    plan = all_at_once(planner.plan(0, attention.q_NHE[-ESTIMATION_ROWS:], attention.k_KNE))
    assert plan is not None
    recalled_H = (weights_HNN * plan.index(0, attention.q_NHE).mask()).sum(dim=2).mean(dim=1)
    for pattern, recalled in zip(found, recalled_H.tolist(), strict=True):
        assert pattern.score == pytest.approx(recalled, abs=1e-4)  # rounded to four digits


def test_every_layer_and_head_of_chain_1_has_a_pattern():
    config = tiny_config(chains=(4, 2), num_layers=3, max_context=1024)
    told = []
    found = search_patterns(
        tiny_model(config),
        np.random.default_rng(0).integers(0, 320, 900),
        options(budget=0.7),
        progress=lambda done, total: told.append((done, total)),
    )
    assert [len(layer) for layer in found.layers] == [4, 4, 4]
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_budget_without_room_is_refused():
    with pytest.raises(ConfigError, match=r"budget=0.01 has no room for any pattern .* 1536 tokens is given; raise it"):
        search_layer(planted(), options(budget=0.01))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": "speed"}, "objective='speed' is unknown; use mass or output"),
        ({"budget": 0.0}, "budget=0.0 must be above 0"),
        ({"budget": 1.0}, "budget=1.0 must be above 0 and below 1, which is dense"),
        ({"budget": float("nan")}, "budget=nan must"),
    ],
)
def test_options_name_what_they_refuse(values, message):
    with pytest.raises(ValueError, match=message):
        SearchOptions(**values)


@pytest.mark.parametrize(
    "shape", [{}, {"kv_sharing": False, "num_kv_heads": 4}, {"bias": True}], ids=["shared", "own", "biases"]
)
@pytest.mark.parametrize("num_tokens", [1, 40, 700])
def test_the_layers_are_those_of_the_model(shape, num_tokens):
    config = tiny_config(max_context=1024, **shape)
    model, token_ids = tiny_model(config), np.random.default_rng(1).integers(0, 320, num_tokens)
    found = [
        tuple(x.clone() for x in (of.q_NHE, of.k_KNE, of.v_KNE, of.out_NHE))
        for of in layer_attentions(model, token_ids)
    ]
    for number, (ours, exact) in enumerate(
        zip(found, exact_layers(tiny_model(config).double(), token_ids), strict=True)
    ):
        for result, wanted in zip(ours, exact, strict=True):
            tolerance.layers(wanted, torch.float32, num_layers=number + 2, width=config.dim).check(result)


@torch.inference_mode()
def exact_layers(model: Any, token_ids: Any) -> list[tuple[Tensor, ...]]:
    """The same by the model's own layers, whole sequences at a time."""
    heads = model.chain1_heads(torch.from_numpy(token_ids))
    return [(*qkv, prefill_attention_reference(*qkv)[0]) for qkv in heads]
