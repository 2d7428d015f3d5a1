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

    Where the block raises or a rename fails, what stood at `target` stands there again and nothing else is left behind.
    If even its way back fails, it is kept where that error says.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=".colm-"))
    whole, old = staging / "new", staging / "old"
    try:
        whole.mkdir()
        yield whole
        if target.exists():
            target.rename(old)
        whole.rename(target)
    finally:
        if os.path.lexists(old) and not os.path.lexists(target):
            old.rename(target)
        shutil.rmtree(staging)
