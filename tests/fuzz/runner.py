"""Runs cases in child processes: one that dies or hangs costs its case, and the next child goes on behind it."""

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil

from tests.children import python

_SILENCE_S = 120.0
"""A case that says nothing for longer hangs, unless the machine gives it no processor time. One that computes is ended
by its own limit long before."""
_MAIN = "from tests.fuzz.child import main; main()"


@dataclass(kw_only=True)
class Counts:
    """How the cases of a run ended."""

    tried: Counter[str] = field(default_factory=Counter)
    typed: Counter[str] = field(default_factory=Counter)
    ok: Counter[str] = field(default_factory=Counter)
    other: dict[str, list[str]] = field(default_factory=dict)
    """Kind against what it was, with the case's name."""
    most_cpu_s: dict[str, float] = field(default_factory=dict)
    """Kind against the processor time of the case that took most."""
    cpu_s: float = 0.0
    """Processor time of all cases, with that of their own children."""

    def add(self, kind: str, ended: str, why: str, cpu_s: float = 0.0) -> None:
        """Count a case."""
        self.tried[kind] += 1
        self.most_cpu_s[kind] = max(cpu_s, self.most_cpu_s.get(kind, 0.0))
        if ended == "other":
            self.other.setdefault(kind, []).append(why)
        else:
            getattr(self, ended)[kind] += 1

    @property
    def num_other(self) -> int:
        """Cases that ended neither well nor in a typed error."""
        return sum(map(len, self.other.values()))


def run(
    kinds: list[str],
    *,
    seed: int,
    first: int,
    num_cases: int,
    seconds: float | None = None,
    cpu_s: float | None = None,
    progress: Callable[[Counts], None] = lambda _: None,
) -> Counts:
    """Run cases.

    Args:
        kinds: of `child.KINDS`.
        seed: with the number of a case, all that it depends on.
        first: number of the first case.
        num_cases: how many follow.
        seconds: stop after this time, whatever is left; None for no limit.
        cpu_s: the same in processor time of the cases.
        progress: told after each case.
    """
    counts = Counts()
    end_s = math.inf if seconds is None else time.monotonic() + seconds

    def is_over() -> bool:
        progress(counts)
        return time.monotonic() > end_s or counts.cpu_s > (math.inf if cpu_s is None else cpu_s)

    next_case, last = first, first + num_cases
    while next_case < last and not is_over():
        next_case = _one_child(kinds, seed, next_case, last, counts, is_over)
    return counts


def _one_child(kinds: list[str], seed: int, first: int, last: int, counts: Counts, is_over: Callable[[], bool]) -> int:
    """Run cases until the child ends; returns the number of the next."""
    next_case, running, is_ready, is_done = first, None, False, False
    before_s = counts.cpu_s
    # Its files are removed here, since it may be ended at any time.
    files = tempfile.TemporaryDirectory(prefix="colm-fuzz-", ignore_cleanup_errors=True)
    with files as folder, tempfile.TemporaryFile("w+") as errors:
        command = python(_MAIN, ",".join(kinds), str(seed), str(first), str(last), folder)
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
        assert child.stdout is not None
        try:
            for words in _lines(child):
                is_ready |= "ready" in words
                is_done |= "done" in words
                if "kind" in words:
                    running = words
                elif "ended" in words:
                    assert running is not None
                    name = f"{running['kind']}, case {words['number']} of seed {seed}"
                    counts.add(running["kind"], words["ended"], f"{name}: {words['why']}", words["cpu_s"])
                    counts.cpu_s = before_s + words["all_cpu_s"]
                    next_case, running = words["number"] + 1, None
                    if is_over():
                        return last
        except TimeoutError:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            status = child.wait()
            child.stdout.close()
        errors.seek(0)
        said = errors.read()[:3000]
    if not is_ready:
        raise RuntimeError(f"the undamaged inputs were not accepted:\n{said}")
    if running is None:
        if not is_done:
            counts.add("end", "other", f"after the last case: {said}")
        return next_case if not is_done else last
    name = f"{running['kind']}, case {running['number']} of seed {seed}"
    word = "took too much processor time" if status == -signal.SIGPROF else f"hung or died, status {status}"
    counts.add(running["kind"], "other", f"{name}: {word}\n{said}")
    return int(running["number"]) + 1


def _lines(child: "subprocess.Popen[bytes]") -> Any:
    """The child's lines.

    Raises:
        TimeoutError: none came for too long, in which it had nothing to compute.
    """
    stream: Any = child.stdout
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        os.set_blocking(stream.fileno(), False)
        waiting = ""
        while True:
            while not selector.select(_SILENCE_S):
                if psutil.Process(child.pid).status() != psutil.STATUS_RUNNING:
                    raise TimeoutError
            data = os.read(stream.fileno(), 1 << 16)
            if not data:
                return
            *whole, waiting = (waiting + data.decode()).split("\n")
            yield from map(json.loads, whole)
