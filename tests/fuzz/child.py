"""Runs cases one after the other, within a memory limit, and says of each how it ended."""

import json
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from colm.errors import ColmError
from tests.fuzz.files import FILES
from tests.fuzz.large import LargeFiles
from tests.fuzz.messages import Messages

MAX_BYTES = 64 << 20
"""Memory of a case, beside what the process has taken before it."""
CPU_S = 1.0
"""Processor time of a case, however busy the machine is; the system ends the process after it."""

KINDS: dict[str, Callable[[Path], Any]] = {**FILES, "large": LargeFiles, "messages": Messages}
_SHARES = {"gguf": 10, "huggingface": 8, "checkpoint": 7, "tokenizer": 6, "messages": 8, "template": 1, "large": 1}


def kind_of(kinds: list[str], seed: int, number: int) -> str:
    """The kind of a case: the same whatever ran before."""
    return random.Random(f"{seed}:{number}").choices(kinds, [_SHARES[kind] for kind in kinds])[0]


def main() -> None:
    """Cases `first` to `last` of a seed, with files in a folder; one line of JSON before each, and one after it."""
    kinds, (seed, first, last) = sys.argv[1].split(","), map(int, sys.argv[2:5])
    _run(kinds, seed, first, last, Path(sys.argv[5]))


def _run(kinds: list[str], seed: int, first: int, last: int, folder: Path) -> None:
    targets = {}
    for kind in kinds:
        (folder / kind).mkdir()
        targets[kind] = KINDS[kind](folder / kind)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    started_s = _cpu_s()
    _say(ready=True)
    for number in range(first, last):
        kind = kind_of(kinds, seed, number)
        _say(number=number, kind=kind)
        resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + MAX_BYTES, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        try:
            targets[kind].run(random.Random(f"{kind}:{seed}:{number}"))
            ended, why = "ok", ""
        except ColmError as err:
            ended, why = "typed", f"{type(err).__name__}: {err}"
        except BaseException as err:  # noqa: BLE001 - whatever it is, it is the finding
            ended, why = "other", "".join(traceback.format_exception(err)[-6:])
        left_s, _ = signal.setitimer(signal.ITIMER_PROF, 0)
        _say(number=number, ended=ended, why=why[-3000:], cpu_s=CPU_S - left_s, all_cpu_s=_cpu_s() - started_s)
    for target in targets.values():
        if hasattr(target, "close"):
            target.close()
    _say(done=True)


def _cpu_s() -> float:
    """Processor time of this process and of its children that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def _data_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData"))


def _say(**words: object) -> None:
    print(json.dumps(words), flush=True)  # noqa: T201 - the parent reads it
