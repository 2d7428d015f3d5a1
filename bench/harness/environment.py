"""The environment that a record states, and measurements of a process from outside."""

import platform
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

PACKAGES = ("torch", "grpcio", "protobuf", "ray", "numpy")
_ARITHMETIC = ("avx", "amx", "fma", "f16c")


def environment() -> dict[str, Any]:
    """What a reader needs to repeat or judge a record: commit, package versions, processor and threads."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parents[2]
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD"),
        # Records written by earlier runs do not make the tree dirty: they do not change what is measured.
        "dirty": bool(git("status", "--porcelain", "--", ".", ":!bench/results")),
        "versions": {"python": platform.python_version(), **_versions()},
        **processor(Path("/proc/cpuinfo").read_text(encoding="utf-8")),
        "threads": torch.get_num_threads(),
    }


def _versions() -> dict[str, str]:
    """Of the packages that are installed; kernels are measured where Ray may be missing."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def processor(cpu_info: str) -> dict[str, Any]:
    """The first processor: its name, which clouds obscure, its family and model, and its features for arithmetic."""
    lines = cpu_info.split("\n\n")[0].splitlines()
    seen = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {
        "cpu": seen.get("model name", "unknown"),
        "cpu_vendor": seen.get("vendor_id"),
        "cpu_family": int(seen["cpu family"]) if "cpu family" in seen else None,
        "cpu_model": int(seen["model"]) if "model" in seen else None,
        "cpu_features": [name for name in seen.get("flags", "").split() if name.startswith(_ARITHMETIC)],
    }


def peak_memory_bytes(pid: int | Literal["self"] = "self") -> int:
    """Peak resident memory of a process since it began to run its program.

    getrusage's peak of a child begins with the parent's, whose memory it shares until it runs its own program.
    """
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))


def in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a module's function in a fresh process with this process's number of threads."""
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=torch.set_num_threads, initargs=threads) as pool:
        return pool.submit(function, *args, **kwargs).result()
