"""Ray's sockets, session files and logs are this user's alone, and gone after `down`."""

import socket
import stat
import tempfile
from pathlib import Path

import pytest

from cluster.ray_files import new_ray_root, remove_ray_root

# What Ray 2.60 puts below its root, with the highest pid of a 64-bit Linux.
SOCKET = "session_2026-11-25_19-53-57_190333_4194304/sockets/plasma_store"


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir(mode=0o700)
    return tmp_path / "state"


def as_ray_fills(root: Path, log: str) -> None:
    """As Ray does it: everything is open to everybody."""
    logs = root / "session_1" / "logs"
    logs.mkdir(parents=True)
    (root / "session_latest").symlink_to(logs.parent)
    (logs / "gcs.log").write_text(log)
    for folder in (root, logs.parent, logs):
        folder.chmod(0o777)


def test_only_this_user_may_enter_rays_folder_though_ray_opens_it(state_dir: Path) -> None:
    root = new_ray_root(state_dir)
    root.chmod(0o777)
    assert stat.S_IMODE(root.parent.stat().st_mode) == 0o700
    assert (state_dir / "ray").resolve() == root


def test_a_socket_fits_however_long_the_state_directorys_path_is(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    deep = state_dir / ("long" * 25)
    deep.mkdir()
    path = new_ray_root(deep) / SOCKET
    try:
        path.parent.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    finally:
        remove_ray_root(deep)


def test_nothing_is_left_but_the_last_clusters_logs_for_this_user(state_dir: Path, tmp_path: Path) -> None:
    for log in ("first", "second"):
        as_ray_fills(new_ray_root(state_dir), log)
        remove_ray_root(state_dir)
    assert not list((tmp_path / "tmp").iterdir())
    assert [path.name for path in state_dir.iterdir()] == ["ray_logs"]
    assert (state_dir / "ray_logs" / "gcs.log").read_text() == "second"
    assert stat.S_IMODE((state_dir / "ray_logs").stat().st_mode) == 0o700


def test_what_a_killed_up_left_goes_with_the_next_one(state_dir: Path, tmp_path: Path) -> None:
    new_ray_root(state_dir)
    assert new_ray_root(state_dir).parent in list((tmp_path / "tmp").iterdir())
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    remove_ray_root(state_dir)
    remove_ray_root(state_dir)
    assert not list(state_dir.iterdir())


def test_a_folder_that_a_stranger_put_in_its_place_is_not_touched(state_dir: Path, tmp_path: Path) -> None:
    """The system clears old temporary files away, and the link tells the name to whoever lists its folder."""
    root = new_ray_root(state_dir)
    root.rmdir()
    root.parent.chmod(0o755)
    mine = tmp_path / "mine"
    (mine / "logs").mkdir(parents=True)
    root.mkdir()
    (root / "session_latest").symlink_to(mine)
    remove_ray_root(state_dir)
    assert (mine / "logs").is_dir()
    assert root.is_dir()
    assert not list(state_dir.iterdir())
