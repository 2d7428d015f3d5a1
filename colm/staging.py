"""Directories that appear whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A fresh directory beside `target` that takes its place when the block ends well.

    Where the block raises, what stood at `target` is untouched and nothing else is left behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".colm-") as staging:
        whole = Path(staging) / "new"
        whole.mkdir()
        yield whole
        if target.exists():
            shutil.move(target, Path(staging) / "old")
        whole.rename(target)
