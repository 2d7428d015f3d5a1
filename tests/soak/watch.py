"""What a soak does to a cluster's processes, and what it sees of their memory."""

import os
import random
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psutil

from cluster.state import ClusterState
from colm.client import Client
from colm.errors import ColmError
from colm.nodes import PoolStatus, Role
from tests.listening import family

ROLES = ("gateway", *(role.value for role in Role))
WHOLE = "cluster"
"""All processes together, Ray's own among them."""
IN_CHANGE = "cluster while it changes"
"""The same, while replicas have others beside them."""
_RESTART_S = 120.0
_WARM_UP_S = 30.0
"""Of a process's life: what it loads and allocates once."""
_LEAST_SAMPLES_S = 120.0
"""Of a role; with less its slope is not judged."""
_MOST_POINTS = 60
_SLACK_BYTES = 64 << 20
_SLACK_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A process that was killed, or told to end."""

    role: str
    signal: str
    at_s: float
    back_after_s: float | None
    """Until another one had taken its place; None if none had by the end."""


@dataclass
class Processes:
    """The processes of a cluster, by role."""

    state: ClusterState
    pools: tuple[PoolStatus, ...] = ()
    """Those whose size follows their load, as the gateway said last."""
    _gateway: psutil.Process | None = None

    def pids(self, client: Client) -> dict[str, list[int]]:
        """Of the roles' replicas; without those that the gateway does not know, and without it while it is gone."""
        found: dict[str, list[int]] = defaultdict(list)
        if (gateway := self.gateway()) is not None:
            found["gateway"].append(gateway)
        try:
            status = client.cluster_status()
            self.pools = status.pools
            for node in status.nodes:
                found[node.report.role.value].append(node.report.process.pid)
        except ColmError:
            pass
        return found

    def gateway(self) -> int | None:
        """The process that listens on the gateway's port."""
        if self._gateway is None or not self._gateway.is_running():
            self._gateway = next((one for one in self._family() if self._listens(one)), None)
        return None if self._gateway is None else self._gateway.pid

    def _family(self) -> list[psutil.Process]:
        assert self.state.ray_pid is not None
        return family(self.state.ray_pid)

    def _listens(self, process: psutil.Process) -> bool:
        port = int(self.state.gateway_address.rpartition(":")[2])
        try:
            connections = process.net_connections("tcp")
        except psutil.Error:
            return False
        return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in connections)


@dataclass
class Memory:
    """Resident memory of each role's processes over their lives, and of all together."""

    samples: dict[str, dict[int, list[tuple[float, int]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )

    def see(self, role: str, pid: int, now_s: float) -> None:
        """Take a sample of a process that may be gone."""
        try:
            self.samples[role][pid].append((now_s, psutil.Process(pid).memory_info().rss))
        except psutil.Error:
            return

    def see_all(self, pid: int, num_changes: int, now_s: float) -> None:
        """Take a sample of a process and all its descendants.

        Args:
            pid: of the process.
            num_changes: begun and ended: an odd number while there is one. Each leaves the cluster of another size.
            now_s: the time.
        """
        size = 0
        for process in family(pid):
            with suppress(psutil.Error):
                size += process.memory_info().rss
        self.samples[IN_CHANGE if num_changes % 2 else WHOLE][num_changes].append((now_s, size))

    def summary(self, role: str, run_s: float) -> dict[str, object]:
        """Peak, last and slope of a role, and whether it is flat; None where there was too little to see."""
        lives = self.samples[role]
        sizes = [size for life in lives.values() for _, size in life]
        settled = [[(t, size) for t, size in life if t >= life[0][0] + _WARM_UP_S] for life in lives.values()]
        slope = _slope([life for life in settled if len(life) > 1])
        seen_s = sum(life[-1][0] - life[0][0] for life in settled if life)
        growth_bytes = None if slope is None else slope * run_s
        allowed_bytes = max(_SLACK_BYTES, _SLACK_SHARE * max(sizes, default=0))
        is_flat = None if growth_bytes is None or seen_s < _LEAST_SAMPLES_S else growth_bytes <= allowed_bytes
        return {
            "num_processes": len(lives),
            "seen_s": round(seen_s, 1),
            "peak_bytes": max(sizes, default=0),
            "last_bytes": sizes[-1] if sizes else 0,
            "slope_bytes_per_min": None if slope is None else round(slope * 60),
            "growth_in_run_bytes": None if growth_bytes is None else round(growth_bytes),
            "allowed_bytes": round(allowed_bytes),
            "is_flat": is_flat,
            "seen_bytes": self._over_time(role),
        }

    def _over_time(self, role: str) -> list[tuple[float, int]]:
        """(seconds, bytes) of the role's processes one after the other, at most `_MOST_POINTS`."""
        points = sorted(point for life in self.samples[role].values() for point in life)
        every = -(-len(points) // _MOST_POINTS) or 1
        return [(round(t - points[0][0], 1), size) for t, size in points[::every]]


def _slope(lives: list[list[tuple[float, int]]]) -> float | None:
    """Bytes a second: the least squares' slope that all lives have in common, each from a level of its own."""
    above = below = 0.0
    for life in lives:
        mean_s = sum(t for t, _ in life) / len(life)
        mean_bytes = sum(size for _, size in life) / len(life)
        above += sum((t - mean_s) * (size - mean_bytes) for t, size in life)
        below += sum((t - mean_s) ** 2 for t, _ in life)
    return above / below if below else None


class Watch:
    """A thread that samples memory each second, and one that kills a replica now and then."""

    def __init__(self, state: ClusterState, *, kill_every_s: float, seed: int, say: Callable[[str], None]) -> None:
        self.memory = Memory()
        self.kills: list[Kill] = []
        self.most_decode = 1
        """Decode replicas that were wanted, and there."""
        self._state = state
        self._kill_every_s = kill_every_s
        self._draw = random.Random(seed)
        self._say = say
        self._started_s = time.monotonic()
        self._is_over = threading.Event()
        self._killing = threading.Lock()
        self._num_changes = 0
        self._threads = [threading.Thread(target=self._sample, name="memory")]
        if kill_every_s:
            self._threads.append(threading.Thread(target=self._kill, name="killer"))

    def __enter__(self) -> "Watch":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    @contextmanager
    def without_kills(self) -> Iterator[None]:
        """Nothing is killed during the block, and what was killed before is back."""
        with self._killing:
            yield

    @contextmanager
    def during_change(self) -> Iterator[None]:
        """The cluster changes during the block."""
        self._num_changes += 1
        try:
            yield
        finally:
            self._num_changes += 1

    def _sample(self) -> None:
        processes = Processes(self._state)
        with Client(self._state.gateway_address, self._state.security) as client:
            while not self._is_over.wait(1.0):
                for role, pids in processes.pids(client).items():
                    for pid in pids:
                        self.memory.see(role, pid, time.monotonic())
                for pool in processes.pools:
                    if pool.role is Role.DECODE:
                        self.most_decode = max(self.most_decode, min(pool.num_wanted, pool.num_present))
                assert self._state.ray_pid is not None
                self.memory.see_all(self._state.ray_pid, self._num_changes, time.monotonic())

    def _kill(self) -> None:
        processes = Processes(self._state)
        with Client(self._state.gateway_address, self._state.security) as client:
            while not self._is_over.wait(self._kill_every_s):
                with self._killing:
                    if not self._is_over.is_set():
                        self._kill_one(processes, client)

    def _kill_one(self, processes: Processes, client: Client) -> None:
        role = self._draw.choice(ROLES)
        if not (pids := processes.pids(client)[role]):
            self._say(f"no {role} to kill: it is not back yet")
            return
        how = self._draw.choice((signal.SIGKILL, signal.SIGTERM))
        os.kill(self._draw.choice(pids), how)
        killed_s = time.monotonic()
        back_s = self._until_back(processes, client, role, {*pids}, len(pids))
        at_s = round(killed_s - self._started_s, 1)
        self.kills.append(Kill(role=role, signal=how.name, at_s=at_s, back_after_s=back_s))
        self._say(f"{how.name} to {role}; " + ("none is back" if back_s is None else f"back after {back_s:.1f} s"))

    def _until_back(
        self, processes: Processes, client: Client, role: str, before: set[int], num_wanted: int
    ) -> float | None:
        """Seconds until as many replicas are there again, one of them new."""
        started_s = time.monotonic()
        while time.monotonic() < started_s + _RESTART_S:
            pids = processes.pids(client)
            by_load = [pool.num_wanted for pool in processes.pools if pool.role.value == role]
            if (
                len(pids[role]) >= min([num_wanted, *by_load])
                and {*pids[role]} - before
                and all(pids[name] for name in ROLES)
            ):
                return round(time.monotonic() - started_s, 2)
            if self._is_over.wait(0.25):
                break
        return None
