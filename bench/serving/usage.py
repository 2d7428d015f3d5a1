"""What the processes of each role use: processor time, and resident memory sampled over time."""

import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import psutil
from pydantic import NonNegativeFloat, NonNegativeInt

from bench.serving.trace import Strict

_SAMPLE_S = 0.2


class RoleUsage(Strict):
    """Of all processes of a role together."""

    cpu_s: NonNegativeFloat
    """Of all their threads, user and system."""
    peak_bytes: NonNegativeInt
    """Highest sum of their resident memory; what they share counts for each."""
    num_processes: NonNegativeInt


class Usage:
    """Watches processes for as long as the block lasts.

    Args:
        processes: of each role; they are those that there are when the block begins.
    """

    def __init__(self, processes: Mapping[str, Sequence[psutil.Process]]) -> None:
        self._processes = processes
        self._began: dict[psutil.Process, float] = {}
        self._cpu_s: dict[psutil.Process, float] = {}
        self._peak_bytes = dict.fromkeys(processes, 0)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="usage", daemon=True)

    def __enter__(self) -> Self:
        self._sample()
        self._began = dict(self._cpu_s)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.set()
        self._thread.join()
        self._sample()

    def roles(self) -> dict[str, RoleUsage]:
        """What each role used, after the block."""
        return {
            role: RoleUsage(
                cpu_s=round(sum(self._cpu_s.get(each, 0.0) - self._began.get(each, 0.0) for each in processes), 2),
                peak_bytes=self._peak_bytes[role],
                num_processes=len(processes),
            )
            for role, processes in self._processes.items()
        }

    def _watch(self) -> None:
        while not self._ends.wait(_SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        for role, processes in self._processes.items():
            self._peak_bytes[role] = max(self._peak_bytes[role], sum(map(self._sample_one, processes)))

    def _sample_one(self, process: psutil.Process) -> int:
        """Resident bytes now; of a process that has ended, its last processor time stays."""
        try:
            with process.oneshot():
                times, resident_bytes = process.cpu_times(), int(process.memory_info().rss)
        except psutil.NoSuchProcess:
            return 0
        self._cpu_s[process] = times.user + times.system
        return resident_bytes
