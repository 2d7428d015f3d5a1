"""Directories that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A fresh directory beside `target` that takes its place when the block ends well.

    If the block raises or a rename fails, the old `target` is put back and nothing else is left behind. If putting it
    back fails too, it is kept at the path that the error names.

    Its files may be read by whoever may read the directory, also those that a library makes for their owner alone.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=".colm-"))
    whole, old = staging / "new", staging / "old"
    try:
        whole.mkdir()
        yield whole
        mode = whole.stat().st_mode & 0o666  # what the umask leaves
        for file in whole.iterdir():
            file.chmod(mode)
        if target.exists():
            target.rename(old)
        whole.rename(target)
    finally:
        if os.path.lexists(old) and not os.path.lexists(target):
            old.rename(target)
        shutil.rmtree(staging)
