"""`colm down`, and the end of a `colm up` that failed: stops Ray, the application and all that they left."""

from collections.abc import Callable
from pathlib import Path

from cluster.local_ray import is_left, is_running, prepare_ray, show_token, stop_ray
from cluster.ray_files import remove_ray_root
from cluster.state import ClusterState, Joined, alone, read_joined
from colm.errors import ClusterError

RAY_TOKEN = "ray_token"
"""File of the token of the Ray that `colm up` started, in the state directory."""

Say = Callable[[str], None]
"""Called with a line for each step."""


def down(state_dir: Path, say: Say) -> bool:
    """Stop the cluster, or what is left of one that never came up, and leave nothing running.

    Returns:
        False if there was none.
    """
    if not state_dir.is_dir():
        return False
    prepare_ray()
    with alone(state_dir):
        state = ClusterState.read(state_dir)
        may_run = read_joined(state_dir) is not None or is_left(state_dir / RAY_TOKEN)
        if may_run:
            say("stopping the replicas" + ("" if state is None else f"; answers that run have {state.drain_s:g} s"))
        if state is not None and is_running(state_dir / RAY_TOKEN):
            show_token(state_dir / RAY_TOKEN)
            # An orderly stop; without it their Ray would just kill them.
            _remove(Joined(state.ray_address, state.cluster), say, state)
        clear(state_dir, say, state)
    return may_run or state is not None


def clear(state_dir: Path, say: Say, state: ClusterState | None = None) -> None:
    """Stop what runs of a cluster, on its own Ray or on one that it joined, and delete its state files."""
    joined = read_joined(state_dir)
    if joined is not None:
        _remove(joined, say, state)
    stop_ray(state_dir / RAY_TOKEN)
    (state_dir / RAY_TOKEN).unlink(missing_ok=True)
    remove_ray_root(state_dir)
    ClusterState.forget(state_dir)


def _remove(joined: Joined, say: Say, state: ClusterState | None) -> None:
    from cluster import deployment  # imports ray, which reads the environment once: after the token is there

    try:
        if state is None:
            deployment.remove(*joined)
        else:
            deployment.remove(*joined, state.application, state.drain_s)
    except ClusterError as err:
        say(str(err))
