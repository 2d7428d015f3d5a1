"""Memory that a prefill node shares with a decode node on its host: payloads go through it, everything else does not.

It is a memfd. No file system has a name for it, so a process that is killed leaves nothing behind. The reader opens it
through the writer's entry in /proc, which the kernel grants to processes of the same user alone. Seals keep its size as
it is, and keep the reader from writing; without them a shrunk file would end the reader with SIGBUS.
"""

import fcntl
import hashlib
import hmac
import mmap
import os
import secrets
from functools import cache
from pathlib import Path
from typing import Final

from colm.errors import PeerUnavailable
from colm.wire.v1 import kv_transfer_service_pb2 as pb

SHARED_WINDOW_BYTES: Final = 32 << 20
"""What a sender holds there of tiles that are not acknowledged: several times what a message brings and what a reader
stores before it says so, so that neither end waits for the other; more would be fresh pages for every transfer."""
_NAME: Final = "colm-kv"
_KEY_BYTES: Final = 32
_FIRST_SLOT: Final = mmap.PAGESIZE
"""The page before holds the key, by which a reader knows that it has opened the right memory."""
_MAX_BYTES: Final = 1 << 30
_F_SEAL_FUTURE_WRITE: Final = 0x10
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE


@cache
def host_id() -> str:
    """What two processes have in common that can open each other's memory; empty where that is not possible.

    A digest over the boot, the namespace of process ids, and the user.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        processes = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return ""
    if not hasattr(os, "memfd_create"):
        return ""
    return hashlib.sha256(f"{boot} {processes} {os.geteuid()}".encode()).hexdigest()


class Slot:
    """A part of the memory, for one payload. Give it back with `release` once its reader has copied the payload."""

    def __init__(self, memory: "SharedMemory", offset_bytes: int, view: memoryview) -> None:
        self._memory = memory
        self._view = view
        self.offset_bytes = offset_bytes
        self.num_bytes = 0

    @property
    def payload(self) -> memoryview:
        """What it holds."""
        return self._view[: self.num_bytes]

    def reserve(self, num_bytes: int) -> memoryview:
        """Where a payload of so many bytes goes."""
        self.num_bytes = num_bytes
        return self.payload

    def release(self) -> None:
        """Let another payload have it."""
        self._memory.give_back(self)


class SharedMemory:
    """The writer's end: slots of one size. Threads may take them while another gives some back.

    Args:
        slot_bytes: longest payload.
        num_slots: payloads at once.

    Raises:
        OSError: the system grants no such memory.
    """

    def __init__(self, slot_bytes: int, num_slots: int) -> None:
        self.slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.size_bytes = _FIRST_SLOT + num_slots * self.slot_bytes
        if self.size_bytes > _MAX_BYTES:
            raise OSError(f"{num_slots} slots of {self.slot_bytes} bytes are more than {_MAX_BYTES} bytes")
        self._key = secrets.token_bytes(_KEY_BYTES)
        self._fd: int | None = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, self.size_bytes)
            # Pages that no payload has reached cost no memory.
            view = memoryview(mmap.mmap(self._fd, self.size_bytes))
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            self.close()
            raise
        view[:_KEY_BYTES] = self._key
        offsets = range(_FIRST_SLOT, self.size_bytes, self.slot_bytes)
        # The slot that was given back last is taken first: the caches still hold it.
        self._free = [Slot(self, offset, view[offset : offset + self.slot_bytes]) for offset in reversed(offsets)]

    def take(self, num_bytes: int) -> Slot | None:
        """A free slot for so many bytes; None if there is none, or if they are too many."""
        if num_bytes > self.slot_bytes:
            return None
        try:
            return self._free.pop()
        except IndexError:
            return None

    def give_back(self, slot: Slot) -> None:
        """The slot may be taken again."""
        if self._fd is not None:
            self._free.append(slot)

    def place(self) -> pb.SharedMemory:
        """What a reader needs to open it.

        Raises:
            OSError: it is closed.
        """
        if self._fd is None:
            raise OSError("the shared memory is closed")
        return pb.SharedMemory(pid=os.getpid(), fd=self._fd, size_bytes=self.size_bytes, key=self._key)

    def close(self) -> None:
        """Let nobody open it any more; the memory itself goes with the last slot and the last reader."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd, self._free = None, []


class SharedReader:
    """The reader's end.

    Args:
        place: as the writer said it.

    Raises:
        OSError: it cannot be opened, or is not what was said.
    """

    def __init__(self, place: pb.SharedMemory) -> None:
        if not _FIRST_SLOT <= place.size_bytes <= _MAX_BYTES:
            raise OSError(f"{place.size_bytes} bytes of shared memory")
        path = f"/proc/{place.pid}/fd/{place.fd}"
        # Whatever else the peer may name, such as a pipe or a device, opening it could block or change something.
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            raise OSError(f"{path} is not shared memory")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            if (missing := _SEALS & ~fcntl.fcntl(fd, fcntl.F_GET_SEALS)) or os.fstat(fd).st_size != place.size_bytes:
                raise OSError(f"{path} lacks the seals {missing:#x}, or does not have {place.size_bytes} bytes")
            self._memory = mmap.mmap(fd, place.size_bytes, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        if not hmac.compare_digest(self._memory[:_KEY_BYTES], place.key):
            raise OSError(f"{path} has another key")
        self._view = memoryview(self._memory)

    def payload(self, payload: pb.SharedPayload) -> memoryview:
        """Where a payload lies; release it before `close`.

        The writer may change it at any time: read each byte once, or copy it first.

        Raises:
            PeerUnavailable: it lies outside the memory.
        """
        first, last = payload.offset_bytes, payload.offset_bytes + payload.num_bytes
        if not _FIRST_SLOT <= first <= last <= len(self._view):
            raise PeerUnavailable(
                f"the KV stream broke its format: a payload at {first} to {last} of {len(self._view)} shared bytes"
            )
        return self._view[first:last]

    def close(self) -> None:
        """Let go of the memory; every payload must have been released."""
        self._view.release()
        self._memory.close()
