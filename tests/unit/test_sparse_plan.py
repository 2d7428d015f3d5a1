"""Plans of sparse attention: what they must list, under which budget, and what a planted head gets.

Shapes: N tokens, H query heads, K kv heads, G = H / K, E head dim.
"""

from itertools import pairwise

import pytest
import torch
from colm_kernels import sparse_estimate, tolerance
from colm_kernels.sparse_estimate import block_means
from colm_kernels.sparse_index import SparseIndex, Tiling
from colm_kernels.sparse_patterns import a_shape, block_sparse, vertical_slash
from colm_kernels.sparse_prefill_attention import sparse_prefill_attention
from colm_kernels.steps import all_at_once
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prefill_node.sparse import audit as audit_module
from prefill_node.sparse.audit import recall_of_rows
from prefill_node.sparse.patterns import AShape, BlockSparse, HeadPattern, PatternFile, VerticalSlash
from prefill_node.sparse.plan import LayerPlan
from prefill_node.sparse.planner import ESTIMATION_ROWS, SparsePlanner
from prefill_node.sparse.policy import ROW_BLOCK, SparsePolicy
from tests.kernel_inputs import prefill_inputs
from tests.tiny import tiny_config

GROUP, NUM_KV_HEADS, HEAD_DIM = 2, 2, 16
CONFIG = tiny_config(chains=(GROUP * NUM_KV_HEADS, 4))
NOTHING_GIVEN = {"dense_below_tokens": 0, "sink_tokens": 0, "local_tokens": 1, "last_rows_dense": 0}


def inputs(num_tokens: int, sharpness: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """q_NHE, k_KNE, v_KNE of a prompt; the sharper, the fewer keys hold most of the attention."""
    q, k, v = prefill_inputs(num_tokens, num_tokens, GROUP * NUM_KV_HEADS, NUM_KV_HEADS, HEAD_DIM, torch.float32)
    return q * sharpness, k, v


def planned(q_NHE: Tensor, k_KNE: Tensor, patterns: PatternFile | None = None, **policy) -> LayerPlan:
    planner = SparsePlanner(CONFIG, SparsePolicy(**(NOTHING_GIVEN | policy)), patterns)
    plan = all_at_once(planner.plan(0, q_NHE[-ESTIMATION_ROWS:], k_KNE))
    assert plan is not None
    return plan


def everywhere(*heads: HeadPattern) -> PatternFile:
    return PatternFile((heads,) * CONFIG.num_layers)


def tiles(plan: LayerPlan, q_NHE: Tensor, tile_tokens: int = 2 * ROW_BLOCK) -> list[SparseIndex]:
    bounds = [*range(0, plan.num_tokens, tile_tokens), plan.num_tokens]
    return [plan.index(start, q_NHE[start:stop]) for start, stop in pairwise(bounds)]


def mask(plan: LayerPlan, q_NHE: Tensor) -> Tensor:
    """Which row attends to which key, by list: [L, N, N]."""
    indexes = tiles(plan, q_NHE)
    return torch.cat(
        [torch.nn.functional.pad(i.mask(), (0, plan.num_tokens - i.tiling.num_keys)) for i in indexes], dim=1
    )


def distances(num_tokens: int) -> Tensor:
    return torch.arange(num_tokens).unsqueeze(1) - torch.arange(num_tokens)


@settings(max_examples=20)
@given(st.integers(1, 700), st.integers(0, 200), st.integers(1, 200), st.integers(0, 150), st.floats(0.01, 0.99))
def test_sinks_nearest_keys_and_all_keys_of_the_last_rows_are_listed(num_tokens, sinks, local, last, mass):
    q, k, _ = inputs(num_tokens)
    plan = planned(q, k, sink_tokens=sinks, local_tokens=local, last_rows_dense=last, mass=mass)
    distance_NN = distances(num_tokens)
    wanted = (distance_NN < local) | (torch.arange(num_tokens) < max(1, sinks))
    wanted[max(0, num_tokens - last) :] = True
    assert (mask(plan, q) | ~(wanted & (distance_NN >= 0))).all()


@settings(max_examples=20)
@given(st.integers(65, 900), st.floats(0.3, 0.99), st.floats(0.5, 4.0))
def test_every_head_recalls_its_share_on_the_rows_that_were_asked(num_tokens, mass, sharpness):
    """The heads of a list look at different numbers of keys: the one that looks at the most needs the most."""
    q, k, _ = inputs(num_tokens, sharpness)
    q[:, ::2] *= 4
    plan = planned(q, k, mass=mass)
    asked_R = torch.arange(num_tokens - ESTIMATION_ROWS, num_tokens)
    recall_H = all_at_once(recall_of_rows(plan, asked_R, lambda position_X: q[position_X], k)).mean(dim=0)
    assert (recall_H >= mass - 1e-5).all()  # whole blocks only add to it; the share is of sums in fp32


def test_a_larger_share_lists_no_less():
    q, k, _ = inputs(1500, 3.0)
    densities = [planned(q, k, mass=mass).density() for mass in (0.2, 0.5, 0.8, 0.95, 1.0)]
    assert densities == sorted(densities)
    assert densities[0] < 0.5
    assert densities[-1] == 1.0


@settings(max_examples=20)
@given(st.integers(130, 1500), st.integers(0, 300), st.integers(1, 300), st.integers(1, 900))
def test_no_row_is_given_more_keys_than_its_budget(num_tokens, sinks, local, extra):
    given_keys = SparsePolicy(sink_tokens=sinks, local_tokens=local).given_keys
    budget = given_keys + extra
    q, k, _ = inputs(num_tokens)
    plan = planned(q, k, mass=None, keys_per_row=budget, sink_tokens=sinks, local_tokens=local)
    if budget >= num_tokens:
        assert plan.density() == 1.0
        return
    for index in tiles(plan, q):
        keys_M = index.block_offsets.diff() * index.tiling.key_block + index.column_offsets.diff()
        assert int(keys_M.max()) <= budget


@pytest.mark.parametrize("policy", [{"mass": 1.0}, {"mass": None, "keys_per_row": 1000}])
def test_a_full_budget_is_dense_attention(policy):
    q, k, v = inputs(640)
    index = planned(q, k, **policy).index(256, q[256:])
    results = sparse_prefill_attention(q[256:], k, v, index)
    tolerance.check_all(tolerance.prefill_attention(q[256:], k, v), results)


def test_a_planted_needle_is_a_vertical_and_a_planted_echo_a_slash():
    """Head 0 looks at key 333 from everywhere, head 2 at what stands 500 tokens back."""
    num_tokens, needle, echo = 1800, 333, 500
    q, k, _ = inputs(num_tokens)
    q, k = 0.1 * q, 0.1 * k
    direction = torch.nn.functional.normalize(torch.randn(HEAD_DIM, generator=torch.Generator().manual_seed(4)), dim=0)
    q[:, 0] += 10 * direction
    k[0, needle] += 10 * direction
    marks_NE = 12 * torch.nn.functional.normalize(
        torch.randn(num_tokens, HEAD_DIM, generator=torch.Generator().manual_seed(5)), dim=1
    )
    k[1] = marks_NE
    q[echo:, 2] = marks_NE[:-echo]
    q[:, 1], q[:, 3] = q[:, 0], q[:, 2]
    plan = planned(q, k, mass=0.9)
    of_needle, of_echo = plan.lists
    assert of_needle.verticals().tolist() == [needle]
    assert plan.density() < 0.4
    listed_KNN, distance_NN = mask(plan, q), distances(num_tokens)
    assert listed_KNN[0, needle:, needle].all()
    assert listed_KNN[1][distance_NN == echo].all()
    assert not len(of_echo.verticals()), "64 columns that one row each looks at serve no other row"
    (_, echoes), stripe = of_echo.lines, echo // 64 * 64
    assert (echoes.nearest_W.tolist(), echoes.farthest_W.tolist()) == ([stripe], [stripe + 63])


def test_each_heads_own_pattern_is_in_its_lists():
    q, k, _ = inputs(900)
    heads = (
        AShape(sink_tokens=70, local_tokens=200),
        VerticalSlash(num_verticals=20, num_slashes=30),
        BlockSparse(num_blocks=3),
        BlockSparse(num_blocks=1),
    )
    plan = planned(q, k, everywhere(*heads), dense_below_tokens=0)
    listed = mask(plan, q)
    tiling = Tiling(num_queries=900, num_keys=900)
    shape = a_shape(tiling, num_lists=1, sink_tokens=70, local_tokens=200).mask()[0]
    vertical, slash = all_at_once(sparse_estimate.vertical_slash_mass(q[:, 1:2], k[:1], num_lists=1, num_rows=64))
    lines = vertical_slash(tiling, verticals_LV=vertical.topk(20).indices, slashes_LW=slash.topk(30).indices).mask()[0]
    assert torch.equal(listed[0], shape | lines)
    means = block_means(q[:, 2:].transpose(0, 1), 128) @ block_means(k[1:], 64).mT
    of_three, of_one = (block_sparse(tiling, means[i : i + 1], num_blocks=n).mask()[0] for i, n in ((0, 3), (1, 1)))
    assert torch.equal(listed[1], of_three | of_one)


MIXED = everywhere(
    AShape(sink_tokens=3, local_tokens=70),
    VerticalSlash(num_verticals=9, num_slashes=5),
    VerticalSlash(num_verticals=40, num_slashes=1),
    BlockSparse(num_blocks=2),
)


@pytest.mark.parametrize("patterns", [None, MIXED], ids=["by mass", "by pattern"])
@pytest.mark.parametrize("num_tokens", [1, 63, 129, 800])
def test_recall_of_rows_is_that_of_the_indexs_own_mask(patterns, num_tokens):
    """From the log-sum-exps as from explicit weights: what an audit sees is what the kernel will attend to."""
    q, k, _ = inputs(num_tokens, 2.0)
    plan = planned(q, k, patterns, mass=0.6, last_rows_dense=min(10, num_tokens // 2))
    row_R = torch.randint(num_tokens, (50,), generator=torch.Generator().manual_seed(0))
    recall_RH = all_at_once(recall_of_rows(plan, row_R, lambda position_X: q[position_X], k))
    index = plan.index(0, q)
    of_rows = tolerance.recall(q, k, index)
    tolerance.Expected(of_rows.exact[row_R], of_rows.allowed[row_R], of_rows.dtype).check(recall_RH)
    scores_HNN = q.double().transpose(0, 1) @ k.double().repeat_interleave(GROUP, dim=0).mT / HEAD_DIM**0.5
    weights_HNN = scores_HNN.masked_fill(distances(num_tokens) < 0, float("-inf")).softmax(dim=2)
    recalled_HN = (weights_HNN * index.mask().repeat_interleave(GROUP, dim=0)).sum(dim=2)
    tolerance.reordered(recalled_HN.T).check(of_rows.exact)
    assert num_tokens < 800 or (recalled_HN < 0.9).any()


def test_dense_lists_recall_everything():
    q, k, _ = inputs(500)
    plan = planned(q, k, mass=0.3).with_dense([1])
    recall_RH = all_at_once(recall_of_rows(plan, torch.arange(128, 500, 7), lambda position_X: q[position_X], k))
    assert (recall_RH[:, GROUP:] == 1.0).all()
    assert (recall_RH[:, :GROUP] < 0.99).any()


def test_an_estimate_never_holds_the_scores_of_all_rows(monkeypatch):
    """Of 64 rows and N keys, let alone of every head: at a million keys that was a gigabyte a head."""
    num_tokens = 16384
    monkeypatch.setattr(sparse_estimate, "SCORES_AT_ONCE", 2 * num_tokens)
    q, k, _ = inputs(num_tokens)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Sizes():
        planned(q, k, mass=0.5)
    assert 2 * num_tokens <= largest <= k.numel() < ESTIMATION_ROWS * num_tokens


@pytest.mark.parametrize(("layer", "num_tokens"), [(1, 200), (0, 99)])
def test_short_prompts_and_chosen_layers_are_dense(layer, num_tokens):
    planner = SparsePlanner(CONFIG, SparsePolicy(dense_below_tokens=100, dense_layers=(1,)))
    q, k, _ = inputs(num_tokens)
    assert all_at_once(planner.plan(layer, q[-64:], k)) is None
    q, k, _ = inputs(100)
    assert all_at_once(planner.plan(0, q[-64:], k)) is not None


def test_a_tile_outside_the_prompt_is_refused():
    q, k, _ = inputs(200)
    with pytest.raises(ValueError, match="queries 128 to 328 are not among the prompt's 200"):
        planned(q, k).index(128, q)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mass": 0.0}, "mass=0.0 must be above 0, where nothing is covered"),
        ({"mass": 1.01}, "mass=1.01 must be above 0"),
        ({"mass": float("nan")}, "mass=nan must be above 0"),
        ({"mass": None}, "mass=None and keys_per_row=None: one of them"),
        ({"keys_per_row": 5000}, "mass=0.95 and keys_per_row=5000: one of them"),
        ({"mass": None, "keys_per_row": 320}, "keys_per_row=320 covers nothing beside the 320 keys"),
        ({"sink_tokens": -1}, "sink_tokens=-1 must be at least 0"),
        ({"local_tokens": 0}, "local_tokens=0 must be at least 1"),
        ({"last_rows_dense": -1}, "last_rows_dense=-1"),
        ({"dense_below_tokens": -1}, "dense_below_tokens=-1"),
        ({"dense_layers": (0, 0)}, r"dense_layers=\(0, 0\) must be layers from 0 on, each once"),
        ({"dense_layers": (-1,)}, r"dense_layers=\(-1,\)"),
    ],
)
def test_a_policy_names_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        SparsePolicy(**options)


def test_a_planner_refuses_a_layer_that_the_model_does_not_have():
    with pytest.raises(ValueError, match=r"dense_layers=\(2,\) names a layer past the model's 2"):
        SparsePlanner(CONFIG, SparsePolicy(dense_layers=(2,)))


LINES = everywhere(*(VerticalSlash(num_verticals=9, num_slashes=5),) * 4)


@pytest.mark.parametrize("patterns", [None, LINES], ids=["by keys", "by pattern"])
def test_planning_and_auditing_pause_after_so_many_scores(monkeypatch, patterns):
    """Whoever waits has the engine at each pause, and a cancelled prompt ends there: of a million keys, one head's
    estimate was seconds of work."""
    num_tokens, at_once = 4096, 1024 * ESTIMATION_ROWS
    for module in (sparse_estimate, audit_module):
        monkeypatch.setattr(module, "SCORES_AT_ONCE", at_once)
    q, k, _ = inputs(num_tokens)

    def finished(steps):
        num_pauses = 0
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value, num_pauses
            num_pauses += 1

    planner = SparsePlanner(CONFIG, SparsePolicy(**NOTHING_GIVEN, mass=None, keys_per_row=500), patterns)
    plan, num_pauses = finished(planner.plan(0, q[-ESTIMATION_ROWS:], k))
    num_heads = GROUP * NUM_KV_HEADS
    assert num_pauses >= 2 * num_heads * ESTIMATION_ROWS * num_tokens / at_once
    rows_R = torch.full((200,), num_tokens - 1)
    _, num_pauses = finished(recall_of_rows(plan, rows_R, lambda position_X: q[position_X], k))
    assert num_pauses >= num_heads * len(rows_R) * num_tokens / at_once
