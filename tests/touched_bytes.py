"""Which bytes of a weights file are in memory: by the mapping, and by the page cache."""

import ctypes
import json
import mmap
import os
import struct
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from colm.checkpoint import Checkpoint
from colm.kv import KvFormat
from colm.model import parameter_shapes
from colm.model.config import ChainConfig
from prefill_node.engine import PrefillEngine
from tests.tiny import edit_json, tiny_checkpoint

ROOT = Path(__file__).parents[1]
MIB = 1 << 20
SLACK_BYTES = 8 * MIB
"""Memory allowed beside the weights: neighbouring pages that a fault maps too, the allocator, code."""
READ_AHEAD_BYTES = 32 * MIB
"""More than any disk reads ahead around a touched page; 8 MiB has been seen."""


def sparse_checkpoint(path: Path, config: ChainConfig) -> Checkpoint:
    """A checkpoint of zeros that takes no room: its weights are a hole in the file."""
    tiny_checkpoint(path)
    edit_json(path / "config.json", model=config.to_dict())
    header, offset = {}, 0
    for name, shape in sorted(parameter_shapes(config).items()):
        stop = offset + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    weights = path / "model.safetensors"
    weights.unlink()
    weights.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(weights, 8 + len(text) + offset)
    return Checkpoint.open(path)


def warm_up(directory: Path) -> None:
    """Let libraries make their one-time allocations."""
    small = tiny_checkpoint(directory)
    kv_format = KvFormat.of(small.config, torch.float32)
    list(PrefillEngine(small, kv_format, tile_tokens=32).run(np.arange(40, dtype=np.int64)))


def drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_pages(path: Path) -> NDArray[np.bool_]:
    """For each page of a file, whether the page cache holds it."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        first_byte = ctypes.c_char.from_buffer(mapped)
        flags = np.zeros(-(-len(mapped) // mmap.PAGESIZE), dtype=np.uint8)
        vector = flags.ctypes.data_as(ctypes.POINTER(ctypes.c_ubyte))
        address = ctypes.c_void_p(ctypes.addressof(first_byte))
        failed = libc.mincore(address, ctypes.c_size_t(len(mapped)), vector)
        del first_byte
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
    return (flags & 1).astype(bool)


def cached_shares(path: Path) -> dict[str, float]:
    """Share of each tensor's pages in the page cache.

    The kernel reads ahead around a touched page. So in later chains only bytes that lie `READ_AHEAD_BYTES` inside a
    tensor count, and smaller tensors are left out.
    """
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    cached, shares = cached_pages(path), {}
    for name, entry in header.items():
        start, stop = (8 + header_bytes + offset for offset in entry["data_offsets"])
        margin = 0 if name.endswith(".chain1") else READ_AHEAD_BYTES
        first, last = -(-(start + margin) // mmap.PAGESIZE), (stop - margin) // mmap.PAGESIZE
        if first < last:
            shares[name] = float(cached[first:last].mean())
    return shares


def resident_bytes_of_mapping(path: Path) -> int:
    """Resident bytes of every mapping of a file in this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and key == "Rss:":
            total += int(rest[0]) * 1024
    return total
