"""The engine of these tests, and a loop over it."""

from collections.abc import AsyncIterator

import pytest
import torch

from colm.kv import KvFormat
from prefill_node import prefill_job
from tests.prefill_benches import Bench, SteppedEngine, a_bench
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> SteppedEngine:
    checkpoint = tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")
    return SteppedEngine(checkpoint, KvFormat.of(checkpoint.config, torch.float32), tile_tokens=25)


@pytest.fixture
async def bench(engine: SteppedEngine) -> AsyncIterator[Bench]:
    async with a_bench(engine) as bench:
        yield bench


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile fills it."""
    monkeypatch.setattr(prefill_job, "WINDOW_BYTES", 1)
