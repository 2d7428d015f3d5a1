"""How many cores there are to use."""

import os


def num_usable_cpus() -> int:
    """Cores that this process may run on.

    Ray starts its workers with OMP_NUM_THREADS=1, so PyTorch would use one thread there.
    """
    return len(os.sched_getaffinity(0))
