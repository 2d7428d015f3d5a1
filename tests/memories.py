"""The shared memory that this process has open."""

import gc
import os
from pathlib import Path


def open_memories() -> list[str]:
    """Files of shared memory among this process's own, mapped ones included."""
    gc.collect()  # an exception that was kept holds its frames, and they hold tiles
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:  # the one that lists the folder
            continue
        if target.startswith("/memfd:colm-kv"):
            found.append(target)
    found += [line for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:colm-kv" in line]
    return found
