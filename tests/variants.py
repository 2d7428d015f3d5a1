"""`make test-variants`: the tests once for each kernel variant that this machine can run, with one thread and with two.

Arguments go to pytest, e.g. `python -m tests.variants tests/numerics`; without any, all tests run.
"""

import os
import subprocess
import sys
import time
from itertools import product

from colm_kernels import native

NUM_THREADS = (1, 2)


def run(variant: str, num_threads: int, arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run pytest as on a machine that has no other variant and so many cores."""
    forced = {"COLM_KERNELS_VARIANT": variant, "OMP_NUM_THREADS": str(num_threads)}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        env=os.environ | forced,
        capture_output=True,
        text=True,
        check=False,
    )


def main(arguments: list[str]) -> int:
    """Print a line a run, and what failed; the exit status says whether all passed."""
    num_failed = 0
    for variant, num_threads in product(native.available_variants(), NUM_THREADS):
        started_s = time.monotonic()
        done = run(variant, num_threads, arguments)
        summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-2000:]
        sys.stdout.write(f"{variant}, threads={num_threads}: {summary} ({time.monotonic() - started_s:.0f} s)\n")
        if done.returncode:
            num_failed += 1
            sys.stdout.write(done.stdout[-8000:] + done.stderr[-2000:])
        sys.stdout.flush()
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
