"""The cluster that is measured: one that runs, or one for the time being."""

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.lifecycle import down, up
from cluster.options import load_config
from cluster.state import ClusterState


@contextmanager
def running(model: Path, state_dir: Path | None, options: Mapping[str, object] | None = None) -> Iterator[ClusterState]:
    """A cluster to ask.

    Args:
        model: what it serves.
        state_dir: of a cluster that runs; it is left running. None brings one up, and takes it down at the end.
        options: of that one, as `section.name`; others have their defaults.

    Raises:
        ClusterError, CheckpointError, ConfigError: as from `colm up`, or there is no cluster.
    """
    if state_dir is not None:
        yield ClusterState.require(state_dir)
        return
    with tempfile.TemporaryDirectory(prefix="colm-bench-") as folder:
        config = load_config(None, {"model.path": model, "gateway.port": 0, **(options or {})})
        state = up(config, Path(folder), _say)
        try:
            yield state
        finally:
            down(Path(folder), _say)


def _say(line: str) -> None:
    with suppress(OSError):  # whoever read it may be gone, and what is being stopped must be stopped all the same
        sys.stderr.write(f"{line}\n")
