"""Records as lines of JSON: appended whole, read even after a writer was killed in the middle of one."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def append(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Add lines, in one write; a torn line that a killed writer left is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{json.dumps(record)}\n" for record in records).encode()
    with path.open("ab+") as file:
        file.seek(0)
        kept = file.read()
        file.truncate(kept.rfind(b"\n") + 1)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; none where there is no file.

    Raises:
        ValueError: a whole line is not JSON, with its number.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")  # what follows the last line's end is torn, or nothing
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as err:
            raise ValueError(f"{path}:{number} is not JSON: {err}") from err
    return records
