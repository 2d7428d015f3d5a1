"""What it costs to load each scale of a model: `python -m bench.load_by_scale --json`.

A checkpoint of random bf16 weights is written once. Every load runs in a process of its own, on a file of which the
page cache holds nothing, and the scales take turns, round after round. First, chain 1's logits must be the same
alone and inside the whole.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from bench.record import environment
from colm.checkpoint import Checkpoint, load, save
from colm.model import parameter_shapes
from colm.model.config import ChainConfig
from colm.model.presets import preset

PRESET = "llama-3.2-1b-8-8-8-8-air"
SEED = 0


def write_random(path: Path, config: ChainConfig) -> Checkpoint:
    """A checkpoint of normal weights, small enough that activations stay finite."""
    generator = torch.Generator().manual_seed(SEED)
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)
        for name, shape in parameter_shapes(config).items()
    }
    return save(path, config, tensors)


def check(checkpoint: Checkpoint) -> None:
    """Chain 1 answers the same, loaded alone and as part of the whole.

    Raises:
        AssertionError: it does not.
    """
    tokens_BT = torch.arange(8).view(1, -1)
    with torch.inference_mode():
        alone, inside = checkpoint.load(1)(tokens_BT), checkpoint.load()(tokens_BT, 1)
    assert torch.equal(alone, inside), "chain 1 answers differently alone and inside the whole"


def observe(path: Path, num_chains: int) -> dict[str, float]:
    """Load one scale in this process and read every weight of it once."""
    with (path / "model.safetensors").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    process = psutil.Process()
    resident_before, start = process.memory_info().rss, time.perf_counter()
    model = load(path, num_chains=num_chains)
    ready = time.perf_counter()
    # One byte of each page is enough to have the kernel read it.
    touched = sum(int(parameter.view(torch.uint8).flatten()[::4096].sum()) for parameter in model.parameters())
    done = time.perf_counter()
    assert touched > 0
    return {
        "mapped_ms": 1e3 * (ready - start),
        "read_s": done - start,
        "resident_mib": (process.memory_info().rss - resident_before) / 2**20,
        "weights_mib": sum(parameter.nbytes for parameter in model.parameters()) / 2**20,
    }


def in_a_fresh_process(path: Path, num_chains: int) -> dict[str, float]:
    """`observe`, from a process that holds nothing of the file yet."""
    call = [sys.executable, "-m", "bench.load_by_scale", "--observe", str(path), "--scale", str(num_chains)]
    root = Path(__file__).parent.parent
    done = subprocess.run(call, cwd=root, capture_output=True, text=True, check=True)
    seen: dict[str, float] = json.loads(done.stdout)
    return seen


def main() -> None:
    """Write, check, measure, print; with --json the record as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default=PRESET, help="a name of colm.model.presets.PRESETS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="where the checkpoint is written for the time of the run")
    parser.add_argument("--json", action="store_true", help="print the record as the last line")
    parser.add_argument("--observe", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--scale", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.observe is not None:
        sys.stdout.write(json.dumps(observe(options.observe, options.scale)) + "\n")
        return
    config = preset(options.preset)
    scales = range(1, config.num_chains + 1)
    runs: dict[int, list[dict[str, float]]] = {scale: [] for scale in scales}
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        checkpoint = write_random(Path(directory) / "model", config)
        check(checkpoint)
        for _ in range(options.rounds):
            for scale in scales:
                runs[scale].append(in_a_fresh_process(checkpoint.path, scale))
    metrics = {
        f"scale{scale}": {name: _spread([run[name] for run in seen]) for name in seen[0]}
        for scale, seen in runs.items()
    }
    for label, values in metrics.items():
        cells = (f"{name} {seen['median']:.4g} [{seen['min']:.4g}..{seen['max']:.4g}]" for name, seen in values.items())
        sys.stdout.write(f"{label}  {'  '.join(cells)}\n")
    if options.json:
        command = " ".join(["python", "-m", "bench.load_by_scale", *sys.argv[1:]])
        record: dict[str, Any] = environment(command, SEED) | {
            "rounds": options.rounds,
            "shape": config.to_dict() | {"preset": options.preset, "dtype": "bfloat16"},
            "metrics": metrics,
        }
        sys.stdout.write(json.dumps(record) + "\n")


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    main()
