"""Memory between two processes: what a reader opens and believes, and that nothing of it stays."""

import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm.errors import PeerUnavailable
from colm.wire.shared_memory import SharedMemory, SharedReader, host_id
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from tests.memories import open_memories

PAGE = mmap.PAGESIZE
WRITER = """
import sys, time
from colm.wire.shared_memory import SharedMemory
memory = SharedMemory(100, 2)
slot = memory.take(5)
slot.reserve(5)[:] = b"bytes"
sys.stdout.buffer.write(memory.place().SerializeToString().hex().encode() + b"\\n")
sys.stdout.flush()
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    assert not open_memories()


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    memory = SharedMemory(2 * PAGE, 3)
    yield memory
    memory.close()


def filled(memory: SharedMemory, payload: bytes) -> pb.SharedPayload:
    slot = memory.take(len(payload))
    assert slot is not None
    slot.reserve(len(payload))[:] = payload
    return pb.SharedPayload(offset_bytes=slot.offset_bytes, num_bytes=slot.num_bytes)


def test_a_reader_finds_each_payload_where_it_was_put(memory: SharedMemory) -> None:
    first, second = filled(memory, b"keysvalues"), filled(memory, b"x" * 2 * PAGE)
    reader = SharedReader(memory.place())
    for place, expected in ((first, b"keysvalues"), (second, b"x" * 2 * PAGE)):
        with reader.payload(place) as payload:
            assert payload == expected
    reader.close()


def test_slots_are_bounded_and_the_last_one_back_is_the_next_one_out(memory: SharedMemory) -> None:
    slots = [memory.take(1) for _ in range(3)]
    assert len({slot.offset_bytes for slot in slots if slot is not None}) == 3
    assert memory.take(1) is None
    assert slots[1] is not None
    slots[1].release()
    assert memory.take(1) is slots[1]


def test_what_is_longer_than_a_slot_gets_none(memory: SharedMemory) -> None:
    assert memory.take(2 * PAGE + 1) is None


def test_a_reader_cannot_write_and_nobody_can_change_the_size(memory: SharedMemory) -> None:
    """With another size its mapping would end in SIGBUS."""
    place = memory.place()
    fd = os.open(f"/proc/{place.pid}/fd/{place.fd}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(fd, place.size_bytes)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        for size in (PAGE, place.size_bytes + PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
    finally:
        os.close(fd)


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
def test_a_payload_outside_the_memory_is_a_broken_stream(offset: int, length: int) -> None:
    memory = SharedMemory(PAGE, 2)
    reader = SharedReader(memory.place())
    payload = pb.SharedPayload(offset_bytes=offset, num_bytes=length)
    if PAGE <= offset <= offset + length <= memory.size_bytes:
        with reader.payload(payload) as found:
            assert len(found) == length
    else:
        with pytest.raises(PeerUnavailable, match="broke its format"):
            reader.payload(payload)
    reader.close()
    memory.close()


def test_memory_that_was_closed_cannot_be_opened(memory: SharedMemory) -> None:
    place = memory.place()
    memory.close()
    with pytest.raises(OSError, match="closed"):
        memory.place()
    with pytest.raises(OSError, match=rf"/proc/{place.pid}/fd/{place.fd}"):
        SharedReader(place)


def unsealed(size: int) -> int:
    fd = os.memfd_create("colm-kv", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


def half_sealed(size: int) -> int:
    fd = unsealed(size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


def pipe(_: int) -> int:
    ours, theirs = os.pipe()
    os.close(theirs)
    return ours


STRANGE = {
    "unsealed": unsealed,
    "its writer could be the reader": half_sealed,
    "a pipe": pipe,
    "a device": lambda _: os.open("/dev/zero", os.O_RDONLY),
    "a file": lambda _: os.open("/proc/self/status", os.O_RDONLY),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_whatever_else_a_peer_names_is_not_opened(kind: str) -> None:
    fd = STRANGE[kind](2 * PAGE)
    try:
        with pytest.raises(OSError, match=r"is not shared memory|lacks the seals"):
            SharedReader(pb.SharedMemory(pid=os.getpid(), fd=fd, size_bytes=2 * PAGE, key=bytes(32)))
    finally:
        os.close(fd)


WRONG = {"size_bytes": 3 * PAGE, "key": bytes(32), "fd": 1 << 31, "pid": (1 << 32) - 1}


@pytest.mark.parametrize("field", WRONG)
def test_memory_that_is_not_what_was_said_is_not_used(memory: SharedMemory, field: str) -> None:
    place = memory.place()
    setattr(place, field, WRONG[field])
    with pytest.raises(OSError, match="/proc/"):
        SharedReader(place)


@pytest.mark.parametrize("size", [0, PAGE - 1, (1 << 30) + 1, (1 << 64) - 1])
def test_a_size_that_no_writer_makes_is_refused(memory: SharedMemory, size: int) -> None:
    place = memory.place()
    place.size_bytes = size
    with pytest.raises(OSError, match=f"{size} bytes of shared memory"):
        SharedReader(place)


def test_too_much_is_not_asked_of_the_system() -> None:
    with pytest.raises(OSError, match="more than"):
        SharedMemory(1 << 20, 1024)


def test_a_killed_writer_leaves_its_reader_the_bytes_and_the_system_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        try:
            place = pb.SharedMemory.FromString(bytes.fromhex(writer.stdout.readline().decode()))
            reader = SharedReader(place)
        finally:
            writer.kill()
    with reader.payload(pb.SharedPayload(offset_bytes=PAGE, num_bytes=5)) as payload:
        assert payload == b"bytes"
    reader.close()
    assert not Path(f"/proc/{place.pid}").exists()
    assert not list(Path("/dev/shm").glob("*colm*"))


def test_processes_of_one_user_and_boot_have_one_host_id() -> None:
    command = "from colm.wire.shared_memory import host_id; print(host_id())"
    other = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == host_id() != ""
