"""Short prompts that share the engine's steps: each one's keys and values are its own, whoever comes, goes or fails.

Shapes: N prompt tokens, K kv heads, E head dim.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from colm_kernels import tolerance
from colm_kernels.native import CancelFlag, Cancelled
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from colm.checkpoint import Checkpoint
from colm.kv import KvFormat, KvTile
from prefill_node import engine as engine_module
from prefill_node.engine import PrefillEngine
from prefill_node.prefill_run import PrefillRun
from tests.tiny import tiny_checkpoint, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

TILE_TOKENS = 40
# Around row blocks of the kernels (8, 16, 32), the tile and two tiles.
LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 20, 31, 32, 33, 39, 40, 41, 81)
NUM_LAYERS = 3
CONFIG = tiny_config(dim=8 * 64, num_layers=NUM_LAYERS)  # heads of the native kernels


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", CONFIG)


def engine_of(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> PrefillEngine:
    return PrefillEngine(checkpoint, KvFormat.of(checkpoint.config, dtype), tile_tokens=TILE_TOKENS)


@cache
def prompt(num_tokens: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng([num_tokens, seed]).integers(0, 320, num_tokens)


class Oracle:
    """The model's own layers, in float64, of whole prompts."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.model = checkpoint.load(1, dtype=dtype).double()
        self.known: dict[bytes, list[tuple[Tensor, Tensor]]] = {}

    @torch.inference_mode()
    def check(self, run: PrefillRun, tiles: list[KvTile]) -> None:
        key = run.token_ids.tobytes()
        if key not in self.known:
            heads = self.model.chain1_heads(torch.from_numpy(run.token_ids))
            self.known[key] = [(k_KNE, v_KNE) for _, k_KNE, v_KNE in heads]
        for layer, exact in enumerate(self.known[key]):
            of_layer = [tile for tile in tiles if tile.layer == layer]
            assert [tile.first_token for tile in of_layer] == list(range(0, run.num_tokens, TILE_TOKENS))
            for name, wanted in zip(("k_KTD", "v_KTD"), exact, strict=True):
                result = torch.cat([getattr(tile, name) for tile in of_layer], dim=1)
                tolerance.layers(wanted, self.dtype, num_layers=layer + 1, width=CONFIG.dim).check(result)


def step(engine: PrefillEngine, runs: list[PrefillRun], tiles: dict[PrefillRun, list[KvTile]]) -> None:
    """Make a step, and keep copies of what it brings."""
    for run, tile in zip(runs, engine.step(runs), strict=True):
        assert (tile is None) == (run.error is not None)
        if tile is not None:
            copy = KvTile(tile.layer, tile.first_token, tile.k_KTD.clone(), tile.v_KTD.clone())
            tiles.setdefault(run, []).append(copy)


@settings(max_examples=100)
@given(lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=7), data=st.data())
def test_keys_and_values_are_the_oracles_however_steps_are_shared(
    shared: dict[torch.dtype, tuple[PrefillEngine, Oracle]], lengths: list[int],
    data: st.DataObject,
) -> None:  # fmt: skip
    """Runs take turns in any order, join and leave; one may be cancelled on the way."""
    engine, oracle = shared[data.draw(st.sampled_from(list(shared)), label="dtype")]
    runs = [engine.begin(prompt(length, seed % 2)) for seed, length in enumerate(lengths)]
    doomed = data.draw(st.sampled_from([None, *runs]), label="doomed")
    tiles: dict[PrefillRun, list[KvTile]] = {}
    while going := [run for run in runs if not (run.is_over or run.error)]:
        chosen = [data.draw(st.sampled_from(going), label="first")]
        for run in data.draw(st.permutations(going), label="others"):
            num_rows = sum(each.num_tokens for each in chosen) + run.num_tokens
            if (
                run not in chosen
                and num_rows <= TILE_TOKENS
                and run.layer == chosen[0].layer
                and data.draw(st.booleans())
            ):
                chosen.append(run)
        if doomed in chosen and data.draw(st.booleans(), label="cancels"):
            doomed.cancelled.set()
        step(engine, chosen, tiles)
    for run in runs:
        if run.error is None:
            oracle.check(run, tiles[run])
        else:
            assert run is doomed
            assert isinstance(run.error, Cancelled)


@pytest.fixture(scope="module")
def shared(checkpoint: Checkpoint) -> dict[torch.dtype, tuple[PrefillEngine, Oracle]]:
    dtypes = (torch.float32, torch.bfloat16)
    return {dtype: (engine_of(checkpoint, dtype), Oracle(checkpoint, dtype)) for dtype in dtypes}


def test_a_run_alone_and_one_step_by_step_compute_the_same_bits(checkpoint: Checkpoint) -> None:
    engine = engine_of(checkpoint)
    run, tiles = engine.begin(prompt(81)), dict[PrefillRun, list[KvTile]]()
    for whole in engine.run(prompt(81)):
        step(engine, [run], tiles)
        assert torch.equal(whole.k_KTD, tiles[run][-1].k_KTD)
        assert torch.equal(whole.v_KTD, tiles[run][-1].v_KTD)
    assert run.is_over


def test_a_pack_that_stays_the_same_is_joined_once(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, joined = engine_of(checkpoint), list[int]()
    join = engine_module.Pack.join
    monkeypatch.setattr(engine_module.Pack, "join", lambda runs, *rest: joined.append(len(runs)) or join(runs, *rest))
    runs, tiles = [engine.begin(prompt(length)) for length in (9, 16, 15)], dict[PrefillRun, list[KvTile]]()
    for members in (runs, runs[::-1], runs):
        step(engine, members, tiles)
    assert joined == [3]


class Attention:
    """The engine's attention, with something that happens to calls of a length."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.original = engine_module.prefill_attention
        self.events: dict[int, Exception | CancelFlag] = {}
        self.lengths: list[int] = []
        monkeypatch.setattr(engine_module, "prefill_attention", self)

    def __call__(self, q_THE: Tensor, *tensors: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        self.lengths.append(len(q_THE))
        match self.events.get(len(q_THE)):
            case CancelFlag() as flag:
                flag.set()
            case Exception() as error:
                raise error
        return self.original(q_THE, *tensors, **options)


@pytest.mark.parametrize("kind", ["cancelled", "failing"])
def test_one_that_ends_inside_a_shared_step_leaves_the_others_their_results(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    engine, attention, tiles = engine_of(checkpoint), Attention(monkeypatch), dict[PrefillRun, list[KvTile]]()
    first, doomed, last = (engine.begin(prompt(length)) for length in (9, 16, 15))
    step(engine, [first, doomed, last], tiles)
    event = doomed.cancelled if kind == "cancelled" else MemoryError()
    attention.events[16] = event
    step(engine, [first, doomed, last], tiles)
    assert isinstance(doomed.error, Cancelled if kind == "cancelled" else MemoryError)
    while not last.is_over:
        step(engine, [first, last], tiles)
    assert len(tiles[doomed]) == 1
    assert attention.lengths.count(16) == 1
    for run in (first, last):
        Oracle(checkpoint).check(run, tiles[run])


def test_a_step_that_nobody_wants_any_more_ends_behind_its_attention(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, attention, tiles = engine_of(checkpoint), Attention(monkeypatch), dict[PrefillRun, list[KvTile]]()
    runs = [engine.begin(prompt(length)) for length in (9, 16)]
    step(engine, runs, tiles)
    attention.events = {run.num_tokens: run.cancelled for run in runs}
    feed_forwards: list[object] = []
    monkeypatch.setattr(type(engine._model.blocks[0].ffn), "forward", lambda *args: feed_forwards.append(args))
    step(engine, runs, tiles)
    assert not feed_forwards
    assert all(isinstance(run.error, Cancelled) for run in runs)


def test_a_run_that_cannot_begin_leaves_the_others_alone(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, allocate = engine_of(checkpoint), PrefillEngine._allocate
    runs, tiles = [engine.begin(prompt(length)) for length in (9, 16)], dict[PrefillRun, list[KvTile]]()

    def lacking(engine: PrefillEngine, run: PrefillRun) -> None:
        if run is runs[0]:
            raise MemoryError
        allocate(engine, run)

    monkeypatch.setattr(PrefillEngine, "_allocate", lacking)
    step(engine, runs, tiles)
    assert isinstance(runs[0].error, MemoryError)
    while not runs[1].is_over:
        step(engine, runs[1:], tiles)
    Oracle(checkpoint).check(runs[1], tiles[runs[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_that_is_not_finite_spoils_nobody_elses(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", CONFIG)
    engine, tiles = engine_of(checkpoint, dtype), dict[PrefillRun, list[KvTile]]()
    engine._model.embedding.chain1.data[319] = float("inf")
    prompts = [prompt(9) % 319, np.full(7, 319), prompt(16) % 319]
    first, spoilt, last = (engine.begin(each) for each in prompts)
    while not last.is_over:
        step(engine, [first, spoilt, last], tiles)
    assert not tiles[spoilt][-1].k_KTD.isfinite().any()
    for run in (first, last):
        Oracle(checkpoint, dtype).check(run, tiles[run])


def test_what_a_run_keeps_of_a_pack_that_it_has_left_is_counted(checkpoint: Checkpoint) -> None:
    """Bug: the rows of all stayed alive with any one of them, and no prediction had them."""
    engine, tiles = engine_of(checkpoint), dict[PrefillRun, list[KvTile]]()
    left, other = engine.begin(prompt(1)), engine.begin(prompt(39))
    step(engine, [left, other], tiles)
    while not other.is_over:
        step(engine, [other], tiles)
    assert left.pack is not None
    rows = left.pack.rows
    held = [left.hidden_ND, left.k_KNE, left.v_KNE, left.pack.x_RD, left.pack.normed_RD, rows.cos_RE, rows.sin_RE]
    storages = [each.untyped_storage() for each in held if each is not None]
    held_bytes = sum({each.data_ptr(): each.nbytes() for each in storages}.values())
    assert held_bytes > engine.pack_bytes(1) > 0
    assert held_bytes <= engine.memory_bytes(1) + engine.pack_bytes(1)
    assert engine.pack_bytes(TILE_TOKENS) == engine.pack_bytes(10 * TILE_TOKENS) == 0


def test_a_runs_flag_says_nothing_of_a_step_that_is_over(checkpoint: Checkpoint) -> None:
    """Else the next step, for which it may wait, would seem to be done already."""
    engine, tiles = engine_of(checkpoint), dict[PrefillRun, list[KvTile]]()
    run, other = engine.begin(prompt(81)), engine.begin(prompt(9))
    for runs in ([run], [run], [run], [run], [other], [other]):
        step(engine, runs, tiles)
        assert runs[0].cancelled.done_share == 0
