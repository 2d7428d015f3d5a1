"""`make test`: all tests in five processes at once: on real clusters, the fuzzer, faults and numerics, half of the unit
tests, and all others.

A cluster's tests wait for processes that start and stop, one after another, and are the longest chain: all others take
what they leave, and the fuzzer what those leave. So both processors have something to do until the end.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_UNITS = tuple(sorted(map(str, Path(__file__).with_name("unit").rglob("test_*.py"))))
_NAMED = {
    "clusters": ("tests/e2e",),
    "fuzzer": ("tests/fuzz",),
    "faults and numerics": ("tests/fault", "tests/numerics"),
    "units": _UNITS[::2],  # as one part with the others they would end long after the rest
}
PARTS = _NAMED | {"all others": tuple(f"--ignore={each}" for named in _NAMED.values() for each in named)}
"""Pytest's arguments, by name: together all tests, each once."""
NICENESS = {"clusters": 0, "fuzzer": 19}
OTHERS_NICENESS = 5

INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def start(name: str, arguments: Sequence[str]) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],  # one cache would be of the last to end
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,  # Ctrl-C reaches it once, from here: a second one would break off the end of a cluster
    )
    niceness = os.getpriority(os.PRIO_PROCESS, 0) + NICENESS.get(name, OTHERS_NICENESS)
    os.setpriority(os.PRIO_PROCESS, process.pid, niceness)
    return process


def follow(name: str, process: "subprocess.Popen[str]") -> int:
    """Pass on a process's lines as they come, under its name; returns its exit status."""
    started_s = time.monotonic()
    assert process.stdout is not None
    for line in process.stdout:
        say(f"{name}: {line}")
    status = process.wait()
    say(f"{name}: ended with {status} after {time.monotonic() - started_s:.0f} s\n")
    return status


def say(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()


def main(parts: Mapping[str, Sequence[str]] = PARTS) -> int:
    """Run the parts; the exit status is 0 if all tests of each passed. An interruption ends all of them in order."""
    processes: list[subprocess.Popen[str]] = []

    def interrupt(*_: object) -> None:
        for process in processes:
            process.send_signal(signal.SIGINT)

    before = [signal.signal(number, interrupt) for number in INTERRUPTIONS]
    try:
        processes.extend(map(start, parts, parts.values()))
        with ThreadPoolExecutor(len(processes)) as threads:
            return int(any(list(threads.map(follow, parts, processes))))
    finally:
        for number, handler in zip(INTERRUPTIONS, before, strict=True):
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
