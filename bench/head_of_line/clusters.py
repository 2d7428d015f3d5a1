"""The cluster that is measured: one that runs, or one for the time being."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cluster.interrupts import Interrupts
from cluster.state import ClusterState
from colm.errors import ClusterError


@contextmanager
def running(model: Path, state_dir: Path | None, options: Mapping[str, object] | None = None) -> Iterator[ClusterState]:
    """A cluster to ask. Only for the main thread, if it brings one up.

    Args:
        model: what it serves.
        state_dir: of a cluster that runs; it is left running. None brings one up, and takes it down at the end.
        options: of that one, as `section.name`; others have their defaults.

    Raises:
        ClusterError, CheckpointError, ConfigError: as from `colm up`, or there is no cluster.
        KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP came; the cluster that was brought up is down.
    """
    if state_dir is not None:
        yield ClusterState.require(state_dir)
        return
    with tempfile.TemporaryDirectory(prefix="colm-bench-") as folder, Interrupts() as interrupts:
        file = Path(folder) / "colm.toml"
        file.write_text(_toml({"model.path": str(model.absolute()), "gateway.port": 0, **(options or {})}))
        # A process reads the token of the first Ray that it joins, and keeps it for all others.
        _colm(Path(folder), "up", "--config", str(file))
        try:
            yield ClusterState.require(Path(folder))
        finally:
            interrupts.deaf = True
            _colm(Path(folder), "down")


def _toml(options: Mapping[str, object]) -> str:
    return "".join(f"{option} = {json.dumps(value)}\n" for option, value in options.items())


def _colm(state_dir: Path, *words: str) -> None:
    command = [sys.executable, "-c", "from cluster.cli import main; main()", *words, "--state-dir", str(state_dir)]
    # In a session of its own: a terminal's Ctrl-C must not end a `colm down`.
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()  # it clears up what it has begun
        raise
    if code:
        raise ClusterError(f"`colm {words[0]}` failed, as it says above")
