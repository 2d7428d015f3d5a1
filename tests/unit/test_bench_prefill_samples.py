"""The paper's tables on this machine: samples of a layer's tiles against the whole."""

import random
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch

from bench.prefill.case import engine_of_random, prompt
from bench.prefill.estimate import NUM_STRATA, PER_STRATUM, choose, estimate, strata
from bench.prefill.layer import KeysValues, SampledLayer, TileSeconds
from bench.prefill.sampling import LayerSample, share_timed, take_turns
from bench.prefill.sparse import Budget
from colm.kv import KvFormat
from colm.model.config import ChainConfig
from tests.clock import FakeClock
from tests.suite_groups import TINY
from tests.tiny import tiny_config


def known(tile: int) -> tuple[float, float]:
    return 512.0, 512.0 * 512 * (tile + 0.5)


@pytest.mark.parametrize("num_tiles", [1, 2, 3, 15, 16, 17, 101, 2048])
def test_strata_are_all_tiles_once_and_each_can_say_how_much_its_tiles_differ(num_tiles: int) -> None:
    found = strata(num_tiles)
    assert [tile for group in found for tile in group] == list(range(num_tiles))
    assert len(found) <= NUM_STRATA
    assert min(map(len, found)) >= min(PER_STRATUM, num_tiles)
    chosen = choose(found, seed=3)
    wanted = num_tiles if num_tiles <= NUM_STRATA * PER_STRATUM else PER_STRATUM * len(found)
    assert len(set(chosen)) == len(chosen) == wanted


@pytest.mark.parametrize("num_tiles", [1, 2, 4, 17, 2048])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_linear_in_rows_and_pairs_is_found_exactly_from_any_sample(num_tiles: int, seed: int) -> None:
    def cost(tile: int) -> float:
        rows, pairs = known(tile)
        return 3e-5 * rows + 2e-9 * pairs

    groups_ = strata(num_tiles)
    found = estimate(groups_, {tile: cost(tile) for tile in choose(groups_, seed=seed)}, known)
    assert found.total == pytest.approx(sum(map(cost, range(num_tiles))), rel=1e-9)
    assert found.standard_error <= 1e-9 * found.total


def test_the_error_bar_holds_the_sum_of_costs_of_another_shape() -> None:
    """Attention slows down beyond a cache, and every tile varies by some percent by itself."""
    groups_, num_held = strata(512), 0
    for seed in range(200):
        generator = random.Random(seed)
        costs = [
            (1 + 0.01 * tile + (0.004 * (tile - 200) if tile > 200 else 0)) * generator.uniform(0.95, 1.05)
            for tile in range(512)
        ]
        found = estimate(groups_, {tile: costs[tile] for tile in choose(groups_, seed=seed)}, known)
        num_held += abs(found.total - sum(costs)) <= 2 * found.standard_error
        assert found.total == pytest.approx(sum(costs), rel=0.05)
    assert num_held >= 170


def test_all_tiles_of_one_layer_are_summed_and_the_other_layers_leave_an_error_bar() -> None:
    costs = {0: 1.0, 1: 2.5, 2: 2.0, 3: 4.0}
    found = estimate(strata(4), costs, known, num_layers=16)
    assert found.total == pytest.approx(9.5)
    assert found.standard_error > 0
    assert estimate(strata(4), costs, known, num_layers=1).standard_error == 0


@dataclass
class FakeLayer:
    """Costs by formula, on a clock that moves only by them."""

    clock: FakeClock
    row_s: float
    pair_s: float

    plan_s: float = 0.0

    def plan(self) -> float:
        self.clock.now_s += self.plan_s
        return self.plan_s

    def time(self, start: int, stop: int) -> TileSeconds:
        rows = stop - start
        seen = TileSeconds(self.row_s * rows, self.pair_s * (rows * start + rows * (rows + 1) / 2))
        self.clock.now_s += sum(seen)
        return seen


@pytest.mark.parametrize("num_tokens", [100, 1024, 16 * 512, 100_000])
def test_a_sample_says_what_all_layers_take_and_the_last_has_keys_and_values_only(num_tokens: int) -> None:
    sample = LayerSample(FakeLayer(FakeClock(), 1e-4, 1e-8, 0.5), num_tokens=num_tokens, tile_tokens=512, seed=0)
    take_turns([sample])
    found = sample.estimate(7)
    pairs = num_tokens * (num_tokens + 1) / 2
    assert found.total == pytest.approx(7 * 1e-4 * num_tokens + 6 * (1e-8 * pairs + 0.5), rel=1e-9)
    assert found.num_timed == pytest.approx(share_timed(num_tokens, 512) * found.num_tiles, abs=0.9)


@dataclass
class NotingLayer(FakeLayer):
    """Says in which order tiles came."""

    name: str = ""
    order: list[tuple[str, int]] = field(default_factory=list)

    def time(self, start: int, stop: int) -> TileSeconds:
        self.order.append((self.name, start // 16))
        return super().time(start, stop)


def order_of(num_tokens: int) -> list[tuple[str, int]]:
    order: list[tuple[str, int]] = []
    layers = [NotingLayer(FakeClock(), 1.0, 1.0, name=name, order=order) for name in "ab"]
    take_turns([LayerSample(layer, num_tokens=num_tokens, tile_tokens=16, seed=0) for layer in layers])
    return order


def test_a_short_prompts_layers_run_from_the_first_tile_to_the_last_as_in_the_engine() -> None:
    """Tiles that came one by one, other models between them, found the weights in memory, not in the caches."""
    assert order_of(64) == [(name, tile) for name in "ab" for tile in (0, *range(4))]


def test_long_prompts_layers_take_turns_at_every_tile_behind_their_own_first() -> None:
    order = order_of(16 * 100)[2:]
    assert len(order) == 2 * 2 * NUM_STRATA * PER_STRATUM
    for turn in range(0, len(order), 4):
        (tile,) = {tile for _, tile in order[turn + 1 : turn + 4 : 2]}
        assert order[turn : turn + 4] == [("a", 0), ("a", tile), ("b", 0), ("b", tile)]


def test_what_a_busy_machine_takes_from_some_turns_is_in_the_sample_as_it_is_in_the_whole() -> None:
    layer = FakeLayer(FakeClock(), 1.0, 0.0)
    sample = LayerSample(layer, num_tokens=64, tile_tokens=16, seed=0)
    for row_s in (1.0, 1.0, 4.0):
        layer.row_s = row_s
        sample.take_all()
    assert sample.estimate(3).total == pytest.approx(2.0 * 64 * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [TINY, tiny_config(bias=True, chains=(4,))], ids=["chained", "biases"])
def test_a_sampled_tile_leaves_the_keys_and_values_that_the_engine_computes(
    config: ChainConfig, dtype: torch.dtype
) -> None:
    """The engine's own hidden states through the sampled layer give the engine's own keys and values of layer 0."""
    wanted = replace(config, num_layers=2, vocab_size=1)
    held = KeysValues.random(KvFormat.of(config, dtype), 40, 0)
    layer = SampledLayer(config, dtype, held, tile_tokens=16, seed=0)
    engine = engine_of_random(wanted, dtype, 16, 0)
    layer._source_TD.copy_(engine._model.embedding.embed(torch.zeros(16, dtype=torch.int64), 1))
    for tile in engine.run(prompt(wanted, 40, 0)):
        if tile.layer == 0:
            stop = tile.first_token + tile.num_tokens
            layer.time(tile.first_token, stop)
            assert torch.equal(held.k_KNE[:, tile.first_token : stop], tile.k_KTD)
            assert torch.equal(held.v_KNE[:, tile.first_token : stop], tile.v_KTD)


@pytest.mark.usefixtures("one_thread")
def test_a_sampled_sparse_tile_leaves_the_hidden_states_that_the_engine_computes() -> None:
    """The second pass of a sparse layer: its queries, what its plan lists, and the feed-forward."""
    config = tiny_config(max_context=2048, num_layers=2, vocab_size=1)
    budget, dtype, num_tokens = Budget(512), torch.float32, 1024
    held = KeysValues.random(KvFormat.of(config, dtype), num_tokens, 0)
    engine = engine_of_random(config, dtype, 128, 0)
    plans = partial(budget.plans, config)
    layer = SampledLayer(config, dtype, held, tile_tokens=128, seed=0, plans=plans)
    layer._source_TD.copy_(engine._model.embedding.embed(torch.zeros(128, dtype=torch.int64), 1))
    run = engine.begin(prompt(config, num_tokens, 0), sparse=budget.plans(config))
    while run.layer == 0 and not run.is_second_pass:
        engine.step([run])
    held.k_KNE.copy_(run.k_KNE)
    held.v_KNE.copy_(run.v_KNE)
    assert layer.plan() > 0
    while run.layer == 0 or run.due is not None:
        engine.step([run])
    assert layer._plan is not None
    assert layer._plan.density() < 0.9
    for start in range(0, num_tokens, 128):
        layer.time(start, start + 128)
        assert torch.equal(layer._x_TD, run.hidden_ND[start : start + 128])


def test_keys_and_values_of_a_sample_are_written_to_the_last_token() -> None:
    held = KeysValues.random(KvFormat.of(TINY, torch.float32), 10_000, 0)
    assert held.k_KNE.abs().amax(dim=(0, 2)).min() > 0
    assert held.v_KNE.std() == pytest.approx(1, abs=0.05)
