"""What a soak changes of its cluster under the requests: options, how many replicas there are, and the model."""

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from colm import defaults
from colm.checkpoint import Checkpoint, prefill_tensor_names, save
from colm.model import parameter_shapes
from tests.e2e.conftest import run_colm
from tests.soak.watch import Watch

_PREFILL = f"max_queued = {defaults.MAX_QUEUED - 1}\n"
"""Both roles are told of it, so all replicas are replaced."""
_DECODE = "max_replicas = 2\nscale_up_s = 5.0\ntarget_use = 0.01\n"
"""Of a pool that a single request at a time makes too small."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change under the requests."""

    what: str
    at_s: float
    took_s: float
    error: str
    """What `colm up` said; empty if it did what it should."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """A cluster that `colm up` brings up, and changes.

    Attributes:
        folder: for its files.
        kv_cache_bytes: as the option.
        drain_s: longer than any request.
    """

    folder: Path
    kv_cache_bytes: str
    drain_s: float

    @property
    def state_dir(self) -> Path:
        """Of `colm`."""
        return self.folder / "state"

    def up(self, model: Path, *, is_changed: bool = False) -> None:
        """Run `colm up`, after the change of options with the changed ones.

        Raises:
            AssertionError: what it said.
        """
        prefill, decode = (_PREFILL, _DECODE) if is_changed else ("", "")
        file = self.folder / "colm.toml"
        file.write_text(
            f'[model]\nname = "soak"\ndtype = "float32"\n[gateway]\nport = 0\ndrain_s = {self.drain_s}\n'
            f"[prefill]\nsparse_dense_below_tokens = 256\n{prefill}"
            f'[decode]\nkv_cache_bytes = "{self.kv_cache_bytes}"\n{decode}'
        )
        run_colm(self.state_dir, "up", "--config", str(file), "--model", str(model))

    def down(self) -> None:
        """Run `colm down`."""
        run_colm(self.state_dir, "down", check=False)


def other_model(path: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Save a model of the same chain 1 whose heads and further chains are others: its keys and values are the same."""
    kept = prefill_tensor_names(checkpoint.config)
    tensors = checkpoint.tensors(parameter_shapes(checkpoint.config))
    return save(
        path,
        checkpoint.config,
        {name: tensor if name in kept else -tensor for name, tensor in tensors.items()},
        text=checkpoint.text,
        tokenizer_json=checkpoint.tokenizer_json(),
    )


def changes(
    cluster: Cluster,
    running: Path,
    other: Path,
    watch: Watch,
    started_s: float,
    seconds: float,
    say: Callable[[str], None],
) -> list[Change]:
    """Change options at a quarter of the time, the model at half and back at three quarters; each when it is its turn.

    Nothing is killed while the model changes: an answer whose gateway is lost then has nowhere to go on (ADR 55).
    """
    steps: Sequence[tuple[str, Callable[[], None], Callable[[], AbstractContextManager[None]]]] = (
        ("other options, and decode replicas by load", partial(cluster.up, running, is_changed=True), nullcontext),
        ("another model", partial(cluster.up, other, is_changed=True), watch.without_kills),
        ("the first model again", partial(cluster.up, running, is_changed=True), watch.without_kills),
    )
    done = []
    for number, (what, change, spared) in enumerate(steps, start=1):
        time.sleep(max(0.0, started_s + number * seconds / (len(steps) + 1) - time.monotonic()))
        with spared(), watch.during_change():
            say(f"colm up: {what}")
            began_s, error = time.monotonic(), ""
            try:
                change()
            except (AssertionError, subprocess.TimeoutExpired) as err:
                error = str(err)
        done.append(Change(what, round(began_s - started_s, 1), round(time.monotonic() - began_s, 1), error))
        say(f"colm up: {what}: " + (error or f"took {done[-1].took_s:.1f} s"))
    return done
