"""Everything that the engines make lies on the device of their placement.

The device here is PyTorch's `meta`: it has shapes and no data, so an operation between it and the CPU is a tensor that
an engine made at the wrong place. What attends and what writes the cache looks at data off CUDA; stand-ins take their
places, which hold all arguments together.

Shapes: as in the engines.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from colm_kernels.native import CancelFlag
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import decode_node.engine
import decode_node.kv_store
import prefill_node.engine
import prefill_node.tile_cache
from colm.checkpoint import Checkpoint
from colm.kv import KvFormat, KvTile
from colm.model.attention import _head_order
from colm.model.rope import Rope
from colm.placement import CPU
from decode_node.engine import DecodeEngine
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from decode_node.plan import PlanRow, StepPlan
from prefill_node.engine import PrefillEngine
from tests.tiny import tiny_checkpoint, tiny_config, tiny_model

META = torch.device("meta")
PAGE_TOKENS, TILE_TOKENS, NUM_PAGES = 4, 5, 16
FORMS: dict[str, dict[str, Any]] = {"plain": {}, "tied": {"tie_embeddings": True}, "biases": {"bias": True}}


class OneDevice(TorchDispatchMode):
    """Refuses an operation on tensors of two devices; counts those that move one from the host, and the others."""

    def __init__(self) -> None:
        super().__init__()
        self.num_moves = 0
        self.num_on_device = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sources, results = devices(args, kwargs), devices(out)
        assert len(sources) <= 1, f"{func} works on {sources}"
        self.num_moves += sources == {CPU} and META in results
        self.num_on_device += sources == {META}
        return out


def devices(*parts: Any) -> set[torch.device]:
    return {leaf.device for leaf in tree_leaves(parts) if isinstance(leaf, Tensor)}


@pytest.fixture(params=FORMS.values(), ids=FORMS.keys())
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Checkpoint:
    return tiny_checkpoint(tmp_path / "model", tiny_config(**request.param))


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def together(*tensors: Tensor) -> None:
        assert devices(tensors) == {META}

    def attend_to_prefix(
        q: Tensor, k: Tensor, v: Tensor, *, backend: str, cancelled: CancelFlag
    ) -> tuple[Tensor, Tensor]:
        assert backend == "triton"
        assert not cancelled.is_set()
        together(q, k, v)
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)

    def attend_to_pages(q: Tensor, *rest: Tensor, cu_seqlens_q_R1: Tensor, **scales: Tensor | None) -> Tensor:
        together(q, *rest, cu_seqlens_q_R1)
        assert set(scales.values()) == {None}
        return torch.empty_like(q)

    def write(*tensors: Tensor) -> None:
        together(*tensors)

    monkeypatch.setattr(prefill_node.engine, "prefill_attention", attend_to_prefix)
    monkeypatch.setattr(prefill_node.tile_cache, "write_kv", write)
    monkeypatch.setattr(decode_node.engine, "decode_attention", attend_to_pages)
    monkeypatch.setattr(decode_node.kv_store, "write_kv", write)
    _head_order.cache_clear()
    yield
    _head_order.cache_clear()


def format_of(checkpoint: Checkpoint) -> KvFormat:
    return KvFormat.of(checkpoint.config, torch.bfloat16)


def test_a_prefill_engine_makes_everything_on_its_device_and_attends_as_it_is_told(checkpoint: Checkpoint) -> None:
    engine = PrefillEngine(
        checkpoint, format_of(checkpoint), tile_tokens=TILE_TOKENS, device=META, attention_backend="triton"
    )
    with OneDevice() as seen:
        tiles = list(engine.run(np.arange(2 * TILE_TOKENS + 1)))
    assert [devices(tile.k_KTD, tile.v_KTD) for tile in tiles] == [{META}] * 3 * checkpoint.config.num_layers
    assert seen.num_on_device
    assert seen.num_moves == 1  # the prompt


def test_a_decode_step_makes_everything_on_the_stores_device_and_crosses_once(checkpoint: Checkpoint) -> None:
    store = KvStore(KvLayout(format_of(checkpoint), PAGE_TOKENS), NUM_PAGES, META)
    engine = DecodeEngine(checkpoint, store)
    tables = [np.arange(3, 8, dtype=np.int32), np.arange(8, 9, dtype=np.int32), np.arange(3, dtype=np.int32)]
    rows = [(17, (3, 5), 3, 2), (0, (7,), 2, 1), (9, (2,), 1, 1)]
    plan = StepPlan(
        tuple(
            PlanRow(
                token_ids=token_ids, position=position, num_chains=num_chains, num_logits=num_logits, table_M=table_M
            )
            for (position, token_ids, num_chains, num_logits), table_M in zip(rows, tables, strict=True)
        )
    )
    with OneDevice() as first:
        logits_QV = engine.step(plan)
    assert (logits_QV.device, logits_QV.shape) == (META, (4, checkpoint.config.vocab_size))
    assert first.num_on_device
    assert first.num_moves == 2  # the step's numbers, and the table of a new batch
    with OneDevice() as second:
        engine.step(plan)
    assert second.num_moves == 1


def test_a_tile_crosses_to_the_stores_device_once_for_keys_and_once_for_values(checkpoint: Checkpoint) -> None:
    kv_format = format_of(checkpoint)
    store = KvStore(KvLayout(kv_format, PAGE_TOKENS), NUM_PAGES, META)
    tokens = torch.zeros(kv_format.num_kv_heads, 11, kv_format.head_dim, dtype=kv_format.dtype)
    with OneDevice() as seen:
        store.write(np.array([5, 3, 9, 4], dtype=np.int32), KvTile(1, 2, tokens, tokens))
    assert seen.num_moves == 2
    assert devices(store.k_pages_LBPKD, store.v_pages_LBPKD) == {META}


def test_an_int8_tile_is_widened_on_the_stores_device(checkpoint: Checkpoint) -> None:
    """So that half the bytes cross: numbers and scales, of keys and of values, once for each run of pages."""
    kv_format = format_of(checkpoint)
    store = KvStore(KvLayout(kv_format, PAGE_TOKENS), NUM_PAGES, META)
    tokens = torch.zeros(kv_format.num_kv_heads, 11, kv_format.head_dim, dtype=torch.int8)
    scales = torch.zeros(2, kv_format.num_kv_heads, 11, dtype=torch.bfloat16)
    with OneDevice() as seen:
        store.write(np.array([3, 4, 5, 6], dtype=np.int32), KvTile(1, 2, tokens, tokens, scales))
    assert seen.num_moves == 4


def test_the_model_itself_and_its_rope_tables_follow_the_tokens() -> None:
    config = tiny_config()
    model = tiny_model(config).to(META)
    with OneDevice():
        logits_BTV = model(torch.zeros(2, 3, dtype=torch.int64, device=META))
    assert logits_BTV.device == META
    assert devices(Rope(config, META).tables(torch.arange(3, device=META))) == {META}


def test_orders_of_heads_are_kept_for_each_device() -> None:
    """Bug: the order was made on the CPU, once for all."""
    for device in (CPU, META, CPU):
        assert devices(_head_order((4, 2), 2, device)) == {device}
