"""The reference of the benchmark of serving, over a tiny model."""

from typing import Any

from bench.serving.one_process import OneProcess
from cluster.options import load_config
from colm.checkpoint import Checkpoint


def config_of(checkpoint: Checkpoint, **overrides: Any) -> Any:
    values = {"model.path": checkpoint.path, "model.dtype": "float32", "gateway.port": 0, "prefill.tile_tokens": 31}
    return load_config(None, values | {"decode.page_tokens": 16, "decode.kv_cache_bytes": 1 << 20} | overrides)


def assert_idle(engine: OneProcess) -> None:
    engine.pool.check_integrity()
    assert engine.pool.num_used == 0
