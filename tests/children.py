"""Processes of a test that never outlive it."""

import os
import sys

_PR_SET_PDEATHSIG = 1

# A killed parent cleans nothing up, and a stopped child reads no pipe: the system has to end it.
_DIE_WITH_PARENT = """
import ctypes, os, signal
ctypes.CDLL(None).prctl({option}, signal.SIGKILL)
if os.getppid() != {parent}:
    os._exit(1)
"""


def python(code: str, *words: str) -> list[str]:
    """The command that runs code, with words in `sys.argv`, in a child that ends when this process ends in any way."""
    prelude = _DIE_WITH_PARENT.format(option=_PR_SET_PDEATHSIG, parent=os.getpid())
    return [sys.executable, "-c", f"{prelude}\n{code}", *words]
