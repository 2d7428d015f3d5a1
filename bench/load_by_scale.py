"""Time and memory of loading each scale of a model: `python -m bench.load_by_scale --json`.

A checkpoint of random bf16 weights is written once, into TMPDIR. Every load runs in a process of its own, with nothing
of the file in the page cache, and the scales take turns in each round. First, chain 1's logits must be the same alone
and inside the whole.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.harness.contest import Case, Contest
from bench.harness.environment import in_fresh_process, peak_memory_bytes
from bench.harness.suite import Options, arguments, run
from bench.random_weights import RandomWeights
from colm.checkpoint import Checkpoint, load, save
from colm.model import parameter_shapes
from colm.model.config import ChainConfig
from colm.model.presets import preset

PRESET = "llama-3.2-1b-8-8-8-8-air"


@dataclass(frozen=True, kw_only=True)
class LoadCase(Case):
    """Every scale of one model."""

    model: str
    config: ChainConfig

    @property
    def name(self) -> str:
        """The model's."""
        return self.model

    @property
    def shape(self) -> dict[str, Any]:
        """The model's, as its config.json has it."""
        return self.config.to_dict() | {"model": self.model, "dtype": "bfloat16"}

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """One contender a scale."""
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = write_random(Path(directory) / "model", self.config, seed)
            yield Contest(
                check=partial(check, checkpoint),
                contenders={
                    f"scale{scale}": partial(in_fresh_process, observe, checkpoint.path, scale)
                    for scale in range(1, self.config.num_chains + 1)
                },
            )


def write_random(path: Path, config: ChainConfig, seed: int) -> Checkpoint:
    """A checkpoint of random weights."""
    weights = RandomWeights(config=config, dtype=torch.bfloat16, seed=seed)
    return save(path, config, weights.tensors(parameter_shapes(config)))


def check(checkpoint: Checkpoint) -> None:
    """Check that chain 1 answers the same, loaded alone and as part of the whole.

    Raises:
        AssertionError: the logits differ.
    """
    tokens_BT = torch.arange(8).view(1, -1)
    with torch.inference_mode():
        alone, inside = checkpoint.load(1)(tokens_BT), checkpoint.load()(tokens_BT, 1)
    assert torch.equal(alone, inside), "chain 1 answers differently alone and inside the whole"


def observe(path: Path, num_chains: int) -> dict[str, float]:
    """Load one scale in this process and read every weight of it once."""
    with Checkpoint.open(path).weights_path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    process = psutil.Process()
    resident_before, start = process.memory_info().rss, time.perf_counter()
    model = load(path, num_chains=num_chains)
    mapped = time.perf_counter()
    # One byte of each page is enough to have the kernel read it.
    touched = sum(int(parameter.view(torch.uint8).flatten()[::4096].sum()) for parameter in model.parameters())
    read = time.perf_counter()
    assert touched > 0
    return {
        "mapped_s": mapped - start,
        "read_s": read - start,
        "resident_bytes": process.memory_info().rss - resident_before,
        "weights_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "process_peak_bytes": peak_memory_bytes(),
    }


class LoadOptions(Options):
    """Options of this benchmark."""

    preset: str


def main() -> None:
    """Run one model."""
    parser = arguments("bench.load_by_scale", __doc__)
    parser.add_argument("--preset", default=PRESET, help=f"a name of colm.model.presets.PRESETS; {PRESET}")
    options = parser.parse_args(namespace=LoadOptions())
    run([LoadCase(model=options.preset, config=preset(options.preset))], options)


if __name__ == "__main__":
    main()
