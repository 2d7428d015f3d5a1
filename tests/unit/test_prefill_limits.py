"""Options that no prompt could be served with are refused by name: before `colm up` starts anything, and by a node."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cluster.lifecycle import up
from cluster.options import load_config
from colm.checkpoint import Checkpoint
from colm.errors import ConfigError
from colm.model.config import ChainConfig
from colm.placement import CPU
from colm.settings import explain
from prefill_node import memory
from prefill_node.memory import run_bytes
from prefill_node.sparse.patterns import AShape, PatternFile
from tests.nodes import prefill_node
from tests.tiny import tiny_checkpoint, tiny_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def tile_bytes(config: ChainConfig, tile_tokens: int) -> int:
    return run_bytes(config, torch.float32, num_tokens=tile_tokens, tile_tokens=tile_tokens)


def patterns_for(config: ChainConfig) -> PatternFile:
    heads = (AShape(sink_tokens=64, local_tokens=64),) * config.chains[0]
    return PatternFile((heads,) * config.num_layers)


Options = Callable[[Checkpoint, Path], dict[str, Any]]


def with_patterns_of(**shape: Any) -> Options:
    def options(_: Checkpoint, folder: Path) -> dict[str, Any]:
        patterns_for(tiny_config(**shape)).write(folder / "patterns.json")
        return {"sparse_patterns": folder / "patterns.json"}

    return options


def with_a_tile_above_memory(checkpoint: Checkpoint, _: Path) -> dict[str, Any]:
    return {"tile_tokens": 400, "memory_bytes": tile_bytes(checkpoint.config, 400) - 1}


def with_a_tile_of_a_whole_context_above_memory(checkpoint: Checkpoint, _: Path) -> dict[str, Any]:
    return {"tile_tokens": 1 << 40, "memory_bytes": tile_bytes(checkpoint.config, checkpoint.config.max_context) - 1}


REFUSED: dict[str, tuple[Options, str]] = {
    "no memory": (lambda *_: {"memory_bytes": 0}, r"memory_bytes=0"),
    "a negative cache": (lambda *_: {"prefix_cache_bytes": -1}, r"prefix_cache_bytes=-1"),
    "no tile": (lambda *_: {"tile_tokens": 0}, r"tile_tokens=0"),
    "a negative tile": (lambda *_: {"tile_tokens": -512}, r"tile_tokens=-512"),
    "a tile above the memory": (with_a_tile_above_memory, r"tile_tokens=400 .* memory_bytes=\d+"),
    "a whole context above the memory": (
        with_a_tile_of_a_whole_context_above_memory,
        r"tile_tokens=1099511627776 .* memory_bytes=\d+",
    ),
    "a share of nothing": (lambda *_: {"sparse_mass": 0.0}, r"sparse_mass=0\.0 must be above 0"),
    "a share that is no number": (lambda *_: {"sparse_mass": float("nan")}, r"sparse_mass=nan must be above 0"),
    "keys that cover nothing": (lambda *_: {"sparse_keys_per_row": 320}, r"sparse_keys_per_row=320 covers nothing"),
    "two budgets": (
        lambda *_: {"sparse_mass": 0.9, "sparse_keys_per_row": 4096},
        r"sparse_mass=0\.9 and sparse_keys_per_row=4096",
    ),
    "patterns of more layers": (with_patterns_of(num_layers=3), r"patterns\.json is of a model of 3 layers"),
    "patterns of fewer heads": (with_patterns_of(chains=(2, 2)), r"patterns\.json: layer 0 has 2 heads"),
    "no patterns": (lambda *_: {"sparse_patterns": Path("absent.json")}, r"absent\.json cannot be read"),
}
GIB = 1 << 30


@pytest.mark.parametrize(("free_bytes", "kept_bytes"), [(64 * GIB, GIB), (8 * GIB, GIB), (GIB, GIB // 8), (0, 0)])
def test_what_is_kept_by_default_leaves_room_for_prompts(
    free_bytes: int, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_free_bytes", lambda _: free_bytes)
    assert memory.default_prefix_cache_bytes(CPU) == kept_bytes
    assert memory.default_memory_bytes(CPU, kept_bytes) == (free_bytes - kept_bytes) // 2


async def test_a_cache_of_all_that_is_free_is_refused_by_name(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=rf"prefix_cache_bytes={1 << 60}, and the device has \d+ bytes free"):
        async with prefill_node(str(checkpoint.path), prefix_cache_bytes=1 << 60):
            pass


ALL_REFUSED = pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())


@ALL_REFUSED
def test_up_starts_nothing_with(options: Options, message: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Bug: a tile that memory has no room for was found out by each prompt of its length, one by one."""
    overrides = {"model.path": checkpoint.path, "model.dtype": "float32", "gateway.port": 0}
    overrides |= {f"prefill.{name}": value for name, value in options(checkpoint, tmp_path).items()}
    with pytest.raises(ConfigError, match=message):
        up(load_config(None, overrides), tmp_path / "state", lambda _: pytest.fail("went on to start something"))
    assert not (tmp_path / "state").exists()


@ALL_REFUSED
async def test_no_node_starts_with(options: Options, message: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, ValidationError)) as refusal:
        async with prefill_node(str(checkpoint.path), **options(checkpoint, tmp_path)):
            pytest.fail("started")
    error = refusal.value
    assert re.search(message, explain(error, str) if isinstance(error, ValidationError) else str(error))


async def test_a_tile_longer_than_any_prompt_is_fine(checkpoint: Checkpoint) -> None:
    memory_bytes = 4 * tile_bytes(checkpoint.config, checkpoint.config.max_context)
    async with prefill_node(str(checkpoint.path), tile_tokens=1 << 40, memory_bytes=memory_bytes) as node:
        assert node.address
