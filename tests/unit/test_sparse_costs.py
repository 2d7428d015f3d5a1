"""What a sparse prompt is expected to cost, in time and in memory, before and while it is computed."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colm.clock import MonotonicClock
from colm.kv import KvFormat
from colm.kv_position import KV_START, KvPosition
from prefill_node.cost_model import CostModel, PrefillShape, Work
from prefill_node.engine import PrefillEngine
from prefill_node.making import Making, make_steps
from prefill_node.prefill_job import PrefillJob, PrefillOrder
from prefill_node.sparse.planner import SparsePlanner
from prefill_node.sparse.policy import ROW_BLOCK, AuditPolicy, SparsePolicy
from prefill_node.sparse.prompt_plans import PromptPlans
from tests.tiny import tiny_checkpoint, tiny_config

CONFIG = tiny_config(num_layers=4, max_context=1 << 20)


def plans(**policy: object) -> PromptPlans:
    chosen: dict[str, object] = {"mass": None, "keys_per_row": 400, "dense_below_tokens": 0}
    return PromptPlans(SparsePlanner(CONFIG, SparsePolicy(**(chosen | policy))), AuditPolicy(floor=0.0))  # type: ignore[arg-type]


def amounts(work: Work) -> tuple[int, ...]:
    return (work.linear_flops, work.attention_flops, work.num_steps, work.sparse_flops, work.plan_flops)


def steps_of(shape: PrefillShape, num_tokens: int, sparse: PromptPlans) -> list[tuple[KvPosition, int]]:
    places = [(KV_START, 0)]
    while places[-1][0] < (shape.num_layers, 0):
        places.append(shape.after_pause(*places[-1], num_tokens, sparse))
    return places


@settings(max_examples=30)
@given(st.integers(1, 3000), st.sampled_from([(), (1,), (0, 2)]))
def test_steps_of_a_sparse_prompt_add_up_and_none_goes_backwards(num_tokens: int, dense: tuple[int, ...]) -> None:
    shape, sparse = PrefillShape.of(CONFIG, 2 * ROW_BLOCK), plans(dense_layers=dense)
    places = steps_of(shape, num_tokens, sparse)
    done = [amounts(shape.sparse_work_before(*place, num_tokens, sparse)) for place in places]
    for before, after in pairwise(done):
        assert all(was <= now for was, now in zip(before, after, strict=True))
    whole = shape.sparse_work_before(KvPosition(shape.num_layers, 0), 0, num_tokens, sparse)
    assert done[-1] == amounts(whole)
    assert whole.num_steps == len(places) - 1
    assert whole.linear_flops == shape.work(num_tokens).linear_flops


def test_a_million_sparse_tokens_take_a_small_part_of_a_dense_prompts_time() -> None:
    """They were counted as dense: 17 times as long, and behind every dense prompt of a quarter of their length."""
    num_tokens = 1 << 20
    shape = PrefillShape.of(CONFIG, 512)
    model = CostModel(shape=shape, linear_flop_s=1e-11, attention_flop_s=1e-11, step_s=1e-4)
    dense_s = model.seconds(shape.work(num_tokens))
    sparse = plans(keys_per_row=4096)
    sparse_s = model.seconds(shape.sparse_work_before(KvPosition(shape.num_layers, 0), 0, num_tokens, sparse))
    assert sparse_s < dense_s / 20
    no_step = max(
        model.seconds(shape.sparse_work_before(*after, num_tokens, sparse))
        - model.seconds(shape.sparse_work_before(*before, num_tokens, sparse))
        for before, after in pairwise(
            [(KvPosition(1, 0), pauses) for pauses in range(sparse.num_plan_steps(0, num_tokens) + 2)]
        )
    )
    assert no_step < 0.01 * sparse_s, "no part of a plan is charged as if it were a layer"


def test_what_is_expected_is_what_the_engine_does(tmp_path: Path) -> None:
    """Once a layer has been planned, its steps are known, and each of the engine's is one that was expected."""
    num_tokens = 1400
    checkpoint = tiny_checkpoint(tmp_path / "tiny", CONFIG)
    engine = PrefillEngine(checkpoint, KvFormat.of(CONFIG, torch.float32), tile_tokens=2 * ROW_BLOCK)
    sparse = plans()
    shape, at, num_pauses = PrefillShape.of(CONFIG, 2 * ROW_BLOCK), KV_START, 0
    seen = [(at, num_pauses)]
    for tile in engine.run(np.arange(num_tokens) % 320, sparse=sparse):
        if tile.num_tokens:
            at, num_pauses = KvPosition(tile.layer, tile.first_token).after(tile.num_tokens, num_tokens), 0
        else:
            num_pauses += 1
        seen.append((at, num_pauses))
    # As they are known at the end, since every layer has steps of its own.
    assert seen == steps_of(shape, num_tokens, sparse)
    assert all(0 < sparse.density(layer, num_tokens) < 1 for layer in range(3))


def test_a_sparse_job_takes_less_and_less_while_it_is_planned(tmp_path: Path) -> None:
    """Its place among others depends on it; counted as dense, it took the longest of all until its last layer."""
    token_ids = np.arange(1400) % 320
    checkpoint = tiny_checkpoint(tmp_path / "tiny", CONFIG)
    engine = PrefillEngine(checkpoint, KvFormat.of(CONFIG, torch.float32), tile_tokens=2 * ROW_BLOCK)
    shape = PrefillShape.of(CONFIG, 2 * ROW_BLOCK)
    costs = CostModel(shape=shape, linear_flop_s=0.0, attention_flop_s=1.0, step_s=0.0)

    def job_of(sparse: PromptPlans | None) -> PrefillJob:
        order = PrefillOrder(transfer_id="t", epoch=1, token_ids=token_ids, sparse=sparse)
        job = PrefillJob(order, place=0, kv_format=engine.kv_format, costs=costs, begun_bytes=0, on_change=lambda: None)
        job.attach(order)
        return job

    sparse = plans()
    job = job_of(sparse)
    assert job.remaining_s < job_of(None).remaining_s
    job.begin(engine.begin(token_ids, sparse=sparse))
    while_planned = []
    while not job.is_computed:
        assert job.run is not None
        (made,) = make_steps(engine, [Making.of(job)], 1, MonotonicClock()).makings
        job.produce(made.tiles, made.end, made.num_pauses)
        if made.end == (2, 0):  # the first layer's plan has told what to expect of this one
            while_planned.append(job.remaining_s)
    num_plan_steps = sparse.num_plan_steps(1, len(token_ids))
    assert len(while_planned) > num_plan_steps
    # What is expected of later layers changes once this one has been planned.
    for stage in (while_planned[: num_plan_steps - 1], while_planned[num_plan_steps + 2 :]):
        assert all(after < before for before, after in pairwise(stage))
    assert job.remaining_s == 0.0
