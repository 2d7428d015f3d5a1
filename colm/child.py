"""Work on what a stranger wrote, by a process of its own, which the system ends when it takes too much."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


class TookTooMuch(Exception):
    """The child ended without an answer: at its limits of CPU time or memory, or for want of either."""


def ask_child(words: Sequence[str], task: bytes, *, timeout_s: float = 60.0) -> dict[str, Any]:
    """What a child answers in JSON on its stdout.

    Args:
        words: of its command, behind Python; the child sets its limits itself.
        task: for its stdin.
        timeout_s: for a child that the machine gives no CPU time; one that computes ends long before, by its limits.

    Raises:
        TookTooMuch: it was ended, or did not answer in time.
    """
    try:
        child = subprocess.run(
            [sys.executable, "-P", *words],
            input=task,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s,
            check=True,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as err:
        raise TookTooMuch from err
    answer: dict[str, Any] = json.loads(child.stdout)
    return answer
