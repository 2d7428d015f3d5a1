"""What every record of a benchmark begins with."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment(command: str, seed: int) -> dict[str, Any]:
    """What a reader needs to repeat or to judge a record."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    packages = ("torch", "grpcio", "protobuf", "ray", "numpy")
    return {
        "command": command,
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "seed": seed,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "measured": "whole",
    }


def cpu_model() -> str:
    """The processor's own name for itself."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
