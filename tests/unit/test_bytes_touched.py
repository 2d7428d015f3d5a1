"""A prefill engine reads chain 1 alone, page by page of the file."""

import json
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import torch

from colm.checkpoint import Checkpoint, prefill_tensor_names
from colm.kv import KvFormat
from colm.model import parameter_shapes
from prefill_node.engine import PrefillEngine
from tests.tiny import tiny_config
from tests.touched_bytes import (
    MIB,
    ROOT,
    SLACK_BYTES,
    cached_pages,
    cached_shares,
    drop_from_page_cache,
    resident_bytes_of_mapping,
    sparse_checkpoint,
    warm_up,
)


def test_a_prefill_engine_never_touches_a_later_chains_bytes(tmp_path: Path) -> None:
    """A fresh process runs a prompt over weights that are not in memory. It then asks the kernel which bytes are: by
    the mapping (smaps), by the process's memory, and by the page cache (mincore).
    """
    config = tiny_config(chains=(2, 14), dim=4096, hidden_dim=16384, num_kv_heads=2, vocab_size=2048)
    checkpoint = sparse_checkpoint(tmp_path / "model", config)
    sizes = {name: 4 * shape.numel() for name, shape in parameter_shapes(config).items()}
    needed = prefill_tensor_names(config)
    needed_bytes = sum(sizes[name] for name in needed)
    assert sum(sizes.values()) > 64 * needed_bytes

    call = [sys.executable, "-c", "from tests.unit.test_bytes_touched import observe_prefill as run; run()"]
    done = subprocess.run([*call, str(checkpoint.path)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)

    assert seen["cached_before_bytes"] < MIB
    assert needed_bytes / 2 < seen["mapped_resident_bytes"] <= needed_bytes + SLACK_BYTES
    assert seen["resident_growth_bytes"] <= needed_bytes + SLACK_BYTES
    shares = seen["cached_shares"]
    assert {name for name in shares if name.endswith(".chain2")} >= {
        f"layers.{layer}.{part}.chain2" for layer in (0, 1) for part in ("ffn.down", "ffn.gate", "ffn.up")
    }
    assert {name: share for name, share in shares.items() if name.endswith(".chain2") and share > 0} == {}
    assert {name for name in needed & shares.keys() if shares[name] < 1} <= {"embedding.chain1"}


def observe_prefill() -> None:
    """The body of the process above: prefill one prompt and print, as JSON, which weights are in memory."""
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(sys.argv[1])
    kv_format = KvFormat.of(checkpoint.config, torch.float32)
    token_ids = np.arange(64, dtype=np.int64)
    warm_up(checkpoint.path.parent / "warm")
    drop_from_page_cache(checkpoint.weights_path)
    cached_before_bytes = int(cached_pages(checkpoint.weights_path).sum()) * mmap.PAGESIZE
    resident_before = psutil.Process().memory_info().rss

    engine = PrefillEngine(checkpoint, kv_format, tile_tokens=32)
    num_tiles = sum(1 for _ in engine.run(token_ids))
    assert num_tiles == 2 * checkpoint.config.num_layers

    report = {
        "cached_before_bytes": cached_before_bytes,
        "mapped_resident_bytes": resident_bytes_of_mapping(checkpoint.weights_path),
        "resident_growth_bytes": psutil.Process().memory_info().rss - resident_before,
        "cached_shares": cached_shares(checkpoint.weights_path),
    }
    sys.stdout.write(json.dumps(report))
