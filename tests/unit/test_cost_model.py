"""What a prompt costs: counted from the shape, corrected by what was measured, and never out of bounds."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from colm.clock import MonotonicClock
from colm.flops import causal_attention_flops, prefill_flops
from colm.kv import KvFormat
from colm.kv_position import KV_START, KvPosition
from prefill_node.cost_model import CORRECTION_S, CostModel, PrefillShape, Work, calibrate
from prefill_node.engine import PrefillEngine
from tests.tiny import tiny_checkpoint, tiny_config

TILES = st.integers(1, 40)
TOKENS = st.integers(1, 300)
LAYERS = st.integers(1, 4)
RATES = st.floats(1e-15, 1e-6)
WORK = st.builds(
    Work,
    linear_flops=st.integers(0, 10**12),
    attention_flops=st.integers(0, 10**12),
    num_steps=st.integers(1, 10_000),
)
TIMES = st.floats(1e-6, 1e4)


def a_shape(num_layers: int = 2, tile_tokens: int = 16) -> PrefillShape:
    return PrefillShape.of(tiny_config(num_layers=num_layers), tile_tokens)


def positions(shape: PrefillShape, num_tokens: int) -> list[KvPosition]:
    places = [KV_START]
    while places[-1] < (shape.num_layers, 0):
        places.append(shape.after_step(places[-1], num_tokens))
    return places


models = st.builds(
    CostModel, shape=st.builds(a_shape, LAYERS, TILES), linear_flop_s=RATES, attention_flop_s=RATES, step_s=RATES
)


@given(models, TOKENS)
def test_a_cost_by_length_alone_lacks_what_a_last_tile_is_short_of(model: CostModel, tokens: int) -> None:
    whole, short = model.seconds(model.shape.work(tokens)), model.prompt_cost().seconds(tokens)
    left_out_s = model.shape.num_layers * model.step_s if tokens % model.shape.tile_tokens else 0.0
    assert whole - left_out_s * (1 + 1e-9) - 1e-9 * whole <= short <= whole * (1 + 1e-9)


@given(LAYERS, TILES, TOKENS, st.integers(0, 20))
def test_what_is_kept_of_a_prompt_leaves_the_work_of_the_rest(
    layers: int, tile_tokens: int, tokens: int, num_kept_tiles: int
) -> None:
    shape = a_shape(layers, tile_tokens)
    cached = min(num_kept_tiles * tile_tokens, tokens)
    places = positions(shape, tokens)
    works = [shape.work_before(place, tokens, cached) for place in places]
    whole, prefix = shape.work(tokens), shape.work(cached) if cached else Work()
    assert works[-1].linear_flops == whole.linear_flops - prefix.linear_flops
    assert works[-1].attention_flops == whole.attention_flops - prefix.attention_flops
    assert (works[-1].num_steps, works[-1].num_kept) == (whole.num_steps - prefix.num_steps, prefix.num_steps)
    for place, (before, after) in zip(places, pairwise(works), strict=False):
        step = after - before
        assert (step.num_kept, step.num_steps) == ((1, 0) if place.token < cached else (0, 1))
        assert (step.linear_flops > 0) or place.token < cached


@given(LAYERS, TILES, TOKENS)
def test_all_steps_together_are_the_prompts_work_and_each_is_some(layers: int, tile_tokens: int, tokens: int) -> None:
    shape = a_shape(layers, tile_tokens)
    whole, places = shape.work(tokens), positions(shape, tokens)
    assert whole.linear_flops + whole.attention_flops == prefill_flops(tiny_config(num_layers=layers), tokens)
    assert whole.num_steps == len(places) - 1
    for before, after in pairwise(shape.work_before(place, tokens) for place in places):
        step = after - before
        assert step.linear_flops > 0
        assert step.attention_flops >= 0
        assert step.num_steps == 1


def test_a_step_attends_with_the_tile_before_it() -> None:
    """Of 5 tokens in tiles of 2: the second layer's first step ends the first layer's attention."""
    shape = a_shape(num_layers=2, tile_tokens=2)
    places = positions(shape, 5)
    done = [shape.work_before(place, 5).attention_flops for place in places]
    attention = [
        causal_attention_flops(num_queries=n, num_keys=n, num_heads=shape.num_heads, head_dim=shape.head_dim)
        for n in (0, 2, 4, 5)
    ]
    assert done == [0, 0, attention[1], attention[2], attention[3], attention[3], attention[3]]


@given(models, TOKENS)
def test_a_longer_prompt_takes_longer(model: CostModel, tokens: int) -> None:
    shorter, longer = (model.seconds(model.shape.work(num_tokens)) for num_tokens in (tokens, tokens + 1))
    assert 0 < shorter < longer


@given(models, WORK, TIMES)
def test_a_correction_lies_between_what_was_predicted_and_what_was_measured(
    model: CostModel, work: Work, took_s: float
) -> None:
    predicted_s = model.seconds(work)
    model.observe(work, took_s)
    low_s, high_s = sorted((predicted_s, took_s))
    assert low_s * (1 - 1e-9) <= model.seconds(work) <= high_s * (1 + 1e-9)


@given(models, WORK, st.sampled_from([0.0, -1.0]))
def test_what_was_not_measured_corrects_nothing(model: CostModel, work: Work, took_s: float) -> None:
    predicted_s = model.seconds(work)
    model.observe(work, took_s)
    assert model.seconds(work) == predicted_s


@example(Work(attention_flops=795_950_000_003, num_steps=405), 5.0)
@given(WORK, st.floats(0.2, 5.0))
def test_after_enough_work_it_predicts_what_is_measured(work: Work, slowdown: float) -> None:
    """The weight is of engine time: many short steps and few long ones teach the same."""
    model = CostModel(shape=a_shape(), linear_flop_s=1e-10, attention_flop_s=1e-10, step_s=1e-3)
    took_s = slowdown * model.seconds(work)
    num_times = max(20, math.ceil(40 * CORRECTION_S / took_s))
    assume(num_times <= 20_000)
    for _ in range(num_times):
        model.observe(work, took_s)
    assert model.seconds(work) == pytest.approx(took_s, rel=0.01)


def test_long_prompts_correct_attention_and_leave_the_steps_alone() -> None:
    model = CostModel(shape=a_shape(), linear_flop_s=1e-12, attention_flop_s=1e-9, step_s=1e-3)
    model.observe(Work(attention_flops=10**10, num_steps=1), 20.0)
    assert model.attention_flop_s > 1.5e-9
    assert model.step_s == pytest.approx(1e-3, rel=1e-3)


def test_an_hour_of_standstill_is_soon_forgotten() -> None:
    """A machine that was suspended during a step of a second says nothing about steps."""
    model = CostModel(shape=a_shape(), linear_flop_s=1e-12, attention_flop_s=1e-12, step_s=1.0)
    model.observe(Work(num_steps=1), 3600.0)
    assert model.step_s <= 8 * (1 + 1e-9)


@pytest.mark.parametrize("num_layers", [1, 2, 5])
@pytest.mark.parametrize("tile_tokens", [1, 64, 512])
def test_a_real_engine_is_calibrated_whatever_its_shape(tmp_path: Path, num_layers: int, tile_tokens: int) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", tiny_config(num_layers=num_layers, max_context=100))
    engine = PrefillEngine(checkpoint, KvFormat.of(checkpoint.config, torch.float32), tile_tokens=tile_tokens)
    model = calibrate(engine, MonotonicClock())
    assert min(model.linear_flop_s, model.attention_flop_s, model.step_s) > 0
    assert model.seconds(model.shape.work(1)) > 0
