"""The prefill engine with sparse attention, against the oracle's layers under the plans' own masks.

Shapes: N prompt tokens, H query heads, K kv heads, E head dim.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from colm_kernels import tolerance
from colm_kernels.native import CancelFlag, Cancelled
from colm_kernels.rotary import rotate_reference
from colm_kernels.sparse_prefill_attention import sparse_prefill_attention_reference
from colm_kernels.steps import Steps
from numpy.typing import NDArray
from torch import Tensor

from colm.checkpoint import Checkpoint
from colm.events import LayerRecall
from colm.kv import KvFormat, KvTile
from colm.model import ChainTransformer
from colm.model.rope import Rope
from prefill_node import engine as engine_module
from prefill_node.engine import PrefillEngine
from prefill_node.sparse import audit as audit_module
from prefill_node.sparse import lines as lines_module
from prefill_node.sparse import planner as planner_module
from prefill_node.sparse.patterns import AShape, BlockSparse, HeadPattern, PatternFile, VerticalSlash
from prefill_node.sparse.plan import LayerPlan
from prefill_node.sparse.planner import SparsePlanner
from prefill_node.sparse.policy import ROW_BLOCK, AuditPolicy, SparsePolicy
from prefill_node.sparse.prompt_plans import PromptPlans
from tests.tiny import tiny_checkpoint, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

TILE_TOKENS = 2 * ROW_BLOCK
NUM_TOKENS = 6 * ROW_BLOCK + 37  # three whole tiles and a ragged one
CONFIG = tiny_config(num_layers=4, max_context=2048)
FEW = {"mass": None, "keys_per_row": 260, "local_tokens": 64, "dense_below_tokens": 0}
LENIENT = AuditPolicy(floor=0.01, confidence=0.05, max_cost=0.049)
"""A few hundred tokens have few rows to look at."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", CONFIG)


class Recorded(PromptPlans):
    """Remembers the plans that it made."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.plans: dict[int, LayerPlan | None] = {}

    def plan(self, layer: int, queries_of: Callable[[Tensor], Tensor], k_KNE: Tensor) -> Steps[LayerPlan | None]:
        self.plans[layer] = yield from super().plan(layer, queries_of, k_KNE)
        return self.plans[layer]


def plans(patterns: PatternFile | None = None, audit_policy: AuditPolicy = LENIENT, **policy: Any) -> Recorded:
    return Recorded(SparsePlanner(CONFIG, SparsePolicy(**(FEW | policy)), patterns), audit_policy)


def engine_of(checkpoint: Checkpoint, tile_tokens: int = TILE_TOKENS) -> PrefillEngine:
    return PrefillEngine(checkpoint, KvFormat.of(checkpoint.config, torch.float32), tile_tokens=tile_tokens)


def prompt(num_tokens: int = NUM_TOKENS, seed: int = 5) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 320, num_tokens)


def computed(
    engine: PrefillEngine, token_ids: NDArray[np.int64], sparse: PromptPlans | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(k_KNE, v_KNE) of each layer, put together from the tiles."""
    layers: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in range(engine.kv_format.num_layers)]
    for tile in engine.run(token_ids, sparse=sparse):
        keys, values = layers[tile.layer]
        assert tile.first_token == sum(k_KTE.shape[1] for k_KTE in keys)
        keys.append(tile.k_KTD.clone())
        values.append(tile.v_KTD.clone())
    return [(torch.cat(keys, dim=1), torch.cat(values, dim=1)) for keys, values in layers]


@torch.inference_mode()
def oracles(
    model: ChainTransformer, token_ids: NDArray[np.int64], plans: dict[int, LayerPlan | None]
) -> list[tuple[Tensor, Tensor]]:
    """(k_KNE, v_KNE) of each layer, whole sequences at a time, attention masked as the plans have it."""
    cos, sin = Rope(model.config).tables(torch.arange(len(token_ids)))
    x_ND, layers = model.embedding.embed(torch.from_numpy(token_ids), 1), []
    for number, layer in enumerate(model.blocks):
        normed_ND = layer.attention_norm(x_ND, 1)
        k_NKE, v_NKE = layer.attention.keys_values(normed_ND)
        k_KNE, v_KNE = rotate_reference(k_NKE, cos, sin).transpose(0, 1), v_NKE.transpose(0, 1)
        layers.append((k_KNE, v_KNE))
        plan = plans.get(number)
        if plan is None:
            (x_ND,) = layer.by_chain([x_ND], cos, sin, 1)
            continue
        q_NHE = rotate_reference(layer.attention.queries(normed_ND, (len(x_ND),)), cos, sin)
        out_NHE, _ = sparse_prefill_attention_reference(q_NHE, k_KNE, v_KNE, plan.index(0, q_NHE))
        x_ND = x_ND + layer.attention.wo(out_NHE.flatten(1), (len(x_ND),))
        (part,) = layer.ffn.by_chain(layer.ffn_norm.by_chain([x_ND]))
        x_ND = x_ND + part
    return layers


def assert_close(ours: list[tuple[Tensor, Tensor]], exact: list[tuple[Tensor, Tensor]]) -> None:
    for layer, (results, wanted) in enumerate(zip(ours, exact, strict=True)):
        for result, exactly in zip(results, wanted, strict=True):
            tolerance.layers(exactly, torch.float32, num_layers=layer + 1, width=CONFIG.dim).check(result)


def assert_equals_oracle(
    checkpoint: Checkpoint, token_ids: NDArray[np.int64], sparse: Recorded, tile_tokens: int = TILE_TOKENS
) -> None:
    ours = computed(engine_of(checkpoint, tile_tokens), token_ids, sparse)
    assert_close(ours, oracles(checkpoint.load(1).double(), token_ids, sparse.plans))


PATTERNS: dict[str, PatternFile | None] = {
    "the policy's budget": None,
    "patterns": PatternFile(
        (
            (
                AShape(sink_tokens=1, local_tokens=4),
                VerticalSlash(num_verticals=20, num_slashes=2),
                AShape(sink_tokens=70, local_tokens=1),
                AShape(sink_tokens=1, local_tokens=1),
            ),
        )
        * CONFIG.num_layers
    ),
}


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize("num_tokens", [NUM_TOKENS, 6 * ROW_BLOCK, 6 * ROW_BLOCK + 1])
def test_keys_and_values_are_those_of_the_plans_masks(
    checkpoint: Checkpoint, patterns: PatternFile | None, num_tokens: int
) -> None:
    """Across tiles and in a ragged last one."""
    sparse = plans(patterns)
    assert_equals_oracle(checkpoint, prompt(num_tokens), sparse)
    assert [plan is not None and plan.density() < 0.9 for plan in sparse.plans.values()] == [True] * 3


def test_blocks_chosen_by_queries_are_chosen_row_block_by_row_block(checkpoint: Checkpoint) -> None:
    """The oracle chooses by its own queries in float64; no two of these few hundred scores are within a rounding."""
    heads: tuple[HeadPattern, ...] = (BlockSparse(num_blocks=3),) * CONFIG.chains[0]
    sparse = plans(PatternFile((heads,) * CONFIG.num_layers))
    assert_equals_oracle(checkpoint, prompt(2 * NUM_TOKENS), sparse)
    assert all(plan is not None and plan.chooses_by_queries for plan in sparse.plans.values())


@pytest.mark.parametrize("tile_tokens", [1, 31, ROW_BLOCK, ROW_BLOCK + 1, 1024])
def test_tiles_are_whole_row_blocks(checkpoint: Checkpoint, tile_tokens: int) -> None:
    assert_equals_oracle(checkpoint, prompt(), plans(), tile_tokens)
    tiles = engine_of(checkpoint, tile_tokens).run(prompt(), sparse=plans())
    assert {tile.first_token % ROW_BLOCK for tile in tiles} == {0}


def test_with_everything_listed_it_is_dense_attention(checkpoint: Checkpoint) -> None:
    sparse = plans(keys_per_row=NUM_TOKENS, max_density=1.0)
    ours = computed(engine_of(checkpoint), prompt(), sparse)
    assert all(plan is not None for plan in sparse.plans.values())  # the sparse kernel ran
    assert_close(ours, oracles(checkpoint.load(1).double(), prompt(), {}))


def test_layer_0_has_the_bits_of_a_dense_prefill_and_the_others_have_not(checkpoint: Checkpoint) -> None:
    dense = computed(engine_of(checkpoint), prompt())
    sparse = computed(engine_of(checkpoint), prompt(), plans())
    equal = [torch.equal(ours[0], theirs[0]) for ours, theirs in zip(sparse, dense, strict=True)]
    assert equal == [True, False, False, False]
    assert torch.equal(sparse[0][1], dense[0][1])


DENSE: dict[str, dict[str, Any]] = {
    "a prompt too short": {"dense_below_tokens": NUM_TOKENS + 1},
    "every layer excepted": {"dense_layers": (0, 1, 2, 3)},
    "a plan that lists too much": {"max_density": 0.1},
    "a floor that no plan reaches": {"audit_policy": AuditPolicy(floor=0.999, max_cost=0.049)},
    "too few rows to audit": {"audit_policy": AuditPolicy(max_cost=1e-6)},
}


@pytest.mark.parametrize("options", DENSE.values(), ids=DENSE.keys())
def test_where_nothing_is_sparse_the_bits_are_those_of_a_dense_prefill(
    checkpoint: Checkpoint, options: dict[str, Any]
) -> None:
    sparse = plans(**options)
    ours, dense = computed(engine_of(checkpoint), prompt(), sparse), computed(engine_of(checkpoint), prompt())
    assert all(torch.equal(a, b) for pair in zip(ours, dense, strict=True) for a, b in zip(*pair, strict=True))
    num_heads = CONFIG.chains[0]
    assert sparse.report().layers == tuple(LayerRecall.of_dense(layer, num_heads=num_heads) for layer in range(3))


def test_a_layer_that_is_excepted_is_dense_among_sparse_ones(checkpoint: Checkpoint) -> None:
    sparse = plans(dense_layers=(1,))
    assert_equals_oracle(checkpoint, prompt(), sparse)
    assert sorted(sparse.plans) == [0, 2]
    assert [layer.num_rows > 0 for layer in sparse.report().layers] == [True, False, True]


def test_the_audits_are_reported_and_are_the_same_where_another_node_computes_again(checkpoint: Checkpoint) -> None:
    first, again = plans(), plans()
    for each in (first, again):
        computed(engine_of(checkpoint), prompt(), each)
    assert first.report() == again.report()
    assert [layer.layer for layer in first.report().layers] == [0, 1, 2]
    for layer in first.report().layers:
        assert layer.num_rows >= 2
        assert 0 < layer.recall_bound < layer.recall < 1
        assert layer.num_dense_heads == 0


def test_between_two_tiles_of_a_sparse_layer_the_engine_may_be_given_to_others(checkpoint: Checkpoint) -> None:
    """A step is a tile's work as with dense attention, not a layer's."""

    def numbers(tile: KvTile) -> tuple[int, int, int]:
        return tile.layer, tile.first_token, tile.num_tokens

    found = [numbers(tile) for tile in engine_of(checkpoint).run(prompt(), sparse=plans())]
    starts = range(0, NUM_TOKENS, TILE_TOKENS)
    expected = [(layer, start, min(TILE_TOKENS, NUM_TOKENS - start)) for layer in range(4) for start in starts]
    assert [each for each in found if each[2]] == expected
    for layer in range(1, 4):
        # A step for each tile's attention, and several for the plan and its audit.
        assert found.count((layer, 0, 0)) > len(starts) + 2
        before = found.index((layer, 0, 0))
        assert found[before - 1] == (layer - 1, starts[-1], NUM_TOKENS - starts[-1])


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (planner_module, "vertical_slash_mass"),
        (lines_module, "_explained"),
        (audit_module, "_recall"),
        (engine_module, "sparse_prefill_attention"),
        (engine_module.PrefillEngine, "_queries"),
    ],
    ids=["planning by patterns", "planning", "auditing", "attending", "asking for queries"],
)
def test_a_cancelled_engine_ends_wherever_a_sparse_layer_is(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    flag, calls = CancelFlag(), []
    original = getattr(module, name)

    def cancelling(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        flag.set()
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, cancelling)
    patterns = PATTERNS["patterns"] if module is planner_module else None
    with pytest.raises(Cancelled):
        list(engine_of(checkpoint).run(prompt(), sparse=plans(patterns), cancelled=flag))
    assert calls == [name]
