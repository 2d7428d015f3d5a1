"""A node keeps the memory of the messages that it has freed."""

import subprocess
import sys

import pytest

from colm.allocator import keep_freed_memory

MESSAGES = """
import resource, sys
from colm.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

def num_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def receive() -> None:
    pieces, message, rest = (bytearray(1 << 20) for _ in range(3))

receive()
before = num_faults()
for _ in range(64):
    receive()
print(num_faults() - before)
"""


def num_faults(how: str) -> int:
    """Page faults of 64 messages of 1 MiB and their pieces, in a process that has freed nothing larger."""
    done = subprocess.run([sys.executable, "-c", MESSAGES, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library has no such limits")
def test_messages_that_were_freed_leave_their_pages_to_the_next_ones() -> None:
    """Defect: 256 faults a message, where a reader frees each message before the next one comes."""
    assert num_faults("kept") < 1024
