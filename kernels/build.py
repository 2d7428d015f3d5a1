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


def build(compiler: str, extra_flags: tuple[str, ...], target: Path) -> None:
    """Compile every source, each with its own target flags, and link them into `target` in one step.

    Raises:
        subprocess.CalledProcessError: the compiler refused.
    """
    sources = sorted(native.SOURCE_DIR.glob("*.cpp"))
    define = f'-DCOLM_SOURCE_HASH="{native.source_hash()}"'
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        commands = [
            [compiler, *native.COMPILE_FLAGS, *native.TARGET_FLAGS.get(source.name, ()), *extra_flags, define]
            + ["-c", str(source), "-o", output]
            for source, output in zip(sources, objects, strict=True)
        ]
        list(threads.map(lambda command: subprocess.run(command, check=True), commands))
        linked = target.with_suffix(f".{os.getpid()}.tmp")
        link = [compiler, "-shared", "-pthread", *extra_flags, *objects, "-o", str(linked)]
        subprocess.run(link, check=True)
    # Replaced in one step: a process that has the old library open keeps it.
    os.replace(linked, target)


def main(arguments: list[str]) -> int:
    """Build as the command line says; the exit status."""
    sanitize = "--sanitize" in arguments
    target = native.LIBRARY_PATH
    extra_flags: tuple[str, ...] = ()
    if sanitize:
        extra_flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1")
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if platform.machine() not in ("x86_64", "AMD64") or compiler is None:
        _say("kernels: no g++ for x86-64 here; the PyTorch fallback is used")
        return 0
    if not sanitize and native.built_hash(target) == native.source_hash():
        _say(f"kernels: {target.name} is up to date")
        return 0
    try:
        build(compiler, extra_flags, target)
    except subprocess.CalledProcessError as err:
        _say(f"kernels: {compiler} failed with status {err.returncode}; see its messages above")
        return 1
    _say(f"kernels: built {target.name} with {compiler}{' (sanitized)' if sanitize else ''}")
    return 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
