"""The folder of a local Ray's sockets, session files and logs, which only this user may enter."""

import os
import shutil
import stat
import tempfile
from pathlib import Path

_LINK = "ray"
_OLD_LOGS = "ray_logs"
# Ray opens every folder that it makes to everybody, its root included: the folder around that root stays closed.
_ROOT = "r"


def new_ray_root(state_dir: Path) -> Path:
    """Make a folder for Ray's files; `state_dir / "ray"` leads there until `remove_ray_root`.

    It lies in the system's folder for temporary files: the path of a socket has at most 107 bytes, of which Ray takes
    up to 69, and a state directory's path may be long.
    """
    remove_ray_root(state_dir)
    root = Path(tempfile.mkdtemp(prefix="colm-")) / _ROOT
    root.mkdir()
    (state_dir / _LINK).symlink_to(root)
    return root


def remove_ray_root(state_dir: Path) -> None:
    """Remove Ray's files but its logs, which replace those of the cluster before in `state_dir / "ray_logs"`."""
    link = state_dir / _LINK
    if not link.is_symlink():
        return
    root = link.readlink()
    link.unlink()
    if not _is_private(root.parent):
        return
    logs = (root / "session_latest").resolve() / "logs"
    if logs.is_dir():
        logs.chmod(0o700)
        shutil.rmtree(state_dir / _OLD_LOGS, ignore_errors=True)
        shutil.move(logs, state_dir / _OLD_LOGS)
    shutil.rmtree(root.parent, ignore_errors=True)


def _is_private(folder: Path) -> bool:
    """Whether it is still ours: the system may have cleared it away, and a stranger put another one in its place."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
