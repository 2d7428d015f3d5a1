"""What the C library's allocator keeps of freed memory, in processes that move keys and values."""

import ctypes
from typing import Final

LARGEST_KEPT_BYTES: Final = 32 << 20
"""Larger blocks come from the system and go back to it, each by itself; glibc takes no larger limit."""
KEPT_BYTES: Final = 64 << 20
"""At the end of each heap, before any of it goes back to the system: what gRPC and the window hold, several times."""
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3


def keep_freed_memory() -> bool:
    """Keep freed blocks for the next ones; the limits are those that glibc comes to by itself once it has freed 32 MiB.

    Until then a freed message goes back to the system, and the next one of the same size is 256 page faults.

    Returns:
        Whether the C library has such limits; musl has not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    limits = (_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES), (_M_TRIM_THRESHOLD, KEPT_BYTES)
    return all(mallopt(limit, num_bytes) == 1 for limit, num_bytes in limits)
