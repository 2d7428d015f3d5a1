"""Loading a scale reads that scale's bytes and no others, by the kernel's own account of the file."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from colm.checkpoint import Checkpoint, load
from colm.convert import slice_scale
from colm.model import parameter_shapes
from tests.tiny import tiny_checkpoint, tiny_config
from tests.touched_bytes import (
    MIB,
    ROOT,
    SLACK_BYTES,
    cached_pages,
    cached_shares,
    drop_from_page_cache,
    resident_bytes_of_mapping,
    sparse_checkpoint,
)


@pytest.mark.parametrize("what", ["forward", "slice"])
@pytest.mark.parametrize("kv_sharing", [True, False], ids=["CoLM-Air", "CoLM"])
def test_a_scale_touches_its_own_bytes_alone(tmp_path: Path, kv_sharing: bool, what: str) -> None:
    """A fresh process loads chain 1 of weights that are not in memory and runs it, or writes it elsewhere."""
    config = tiny_config(
        chains=(2, 14),
        kv_sharing=kv_sharing,
        num_kv_heads=2 if kv_sharing else 8,
        dim=4096,
        hidden_dim=16384,
        vocab_size=2048,
    )
    checkpoint = sparse_checkpoint(tmp_path / "model", config)
    scale_bytes, whole_bytes = (
        4 * sum(shape.numel() for shape in parameter_shapes(config, scale).values()) for scale in (1, 2)
    )
    assert whole_bytes > 40 * scale_bytes

    call = [sys.executable, "-c", "from tests.unit.test_load_by_scale import observe as run; run()"]
    done = subprocess.run(
        [*call, str(checkpoint.path), what], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)

    assert seen["cached_before_bytes"] < MIB
    assert seen["mapped_resident_bytes"] <= scale_bytes + SLACK_BYTES
    assert seen["resident_growth_bytes"] <= 2 * scale_bytes + SLACK_BYTES
    later = {name: share for name, share in seen["cached_shares"].items() if name.endswith(".chain2")}
    assert later
    assert {name: share for name, share in later.items() if share > 0} == {}


def observe() -> None:
    """The body of the process above."""
    torch.set_num_threads(1)
    path, what = Path(sys.argv[1]), sys.argv[2]
    tokens_BT = torch.arange(64).view(1, -1)
    warm = tiny_checkpoint(path.parent / "warm")
    load(warm.path, num_chains=1)(tokens_BT)
    weights = Checkpoint.open(path).weights_path
    drop_from_page_cache(weights)
    cached_before_bytes = int(cached_pages(weights).sum()) * 4096
    resident_before = psutil.Process().memory_info().rss

    if what == "forward":
        model = load(path, num_chains=1)
        with torch.inference_mode():
            model(tokens_BT)
    else:
        slice_scale(path, path.parent / "slice", 1)

    report = {
        "cached_before_bytes": cached_before_bytes,
        "mapped_resident_bytes": resident_bytes_of_mapping(weights),
        "resident_growth_bytes": psutil.Process().memory_info().rss - resident_before,
        "cached_shares": cached_shares(weights),
    }
    sys.stdout.write(json.dumps(report))
