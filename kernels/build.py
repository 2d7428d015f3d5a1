"""Build the CPU library: `python kernels/build.py`.

Skips when it is up to date; without a C++ compiler says so and leaves the operations to PyTorch.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from colm_kernels import native


def build(compiler: str, target: Path) -> None:
    """Compile every source, each with its own target flags, and link them into `target` in one step.

    Raises:
        subprocess.CalledProcessError: the compiler refused.
    """
    sources = sorted(native.SOURCE_DIR.glob("*.cpp"))
    base = [compiler, *native.COMPILE_FLAGS]
    # For the one source that says it: a compiler's cache then knows all others again.
    own = native.TARGET_FLAGS | {"library.cpp": (f'-DCOLM_SOURCE_HASH="{native.source_hash()}"',)}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        commands = [
            [*base, *own.get(source.name, ()), "-c", str(source), "-o", output]
            for source, output in zip(sources, objects, strict=True)
        ]
        list(threads.map(lambda command: subprocess.run(command, check=True), commands))
        linked = target.with_suffix(f".{os.getpid()}.tmp")
        link = [compiler, "-shared", "-pthread", *native.SANITIZER_FLAGS, *objects, "-o", str(linked)]
        subprocess.run(link, check=True)
    # Replaced in one step: a process that has the old library open keeps it.
    os.replace(linked, target)


def main() -> int:
    """Build if there is something to build; the exit status."""
    target = native.LIBRARY_PATH
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if platform.machine() not in ("x86_64", "AMD64") or compiler is None:
        _say("kernels: no g++ for x86-64 here; the PyTorch fallback is used")
        return 0
    # A sanitised library loads only into a process with its runtime preloaded, so its hash cannot be read here.
    if not native.SANITIZED and native.built_hash(target) == native.source_hash():
        _say(f"kernels: {target.name} is up to date")
        return 0
    try:
        build(compiler, target)
    except subprocess.CalledProcessError as err:
        _say(f"kernels: {compiler} failed with status {err.returncode}; see its messages above")
        return 1
    _say(f"kernels: built {target.name} with {compiler}")
    return 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
