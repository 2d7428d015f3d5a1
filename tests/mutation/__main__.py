"""The mutation check, `make mutants`: apply each mutation to a copy of the source and see that its test fails.

First all the tests must pass on the copy as it is. A test that hangs is stopped, and counts as failed.
"""

import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutation.mutant import Mutant
from tests.mutation.mutants import MUTANTS

ROOT = Path(__file__).parents[2]
HANG_S = 30  # the slowest of the tests takes 12 s alone
TESTS_FAILED = 1  # pytest's exit status for failed tests; any other than 0 means that it could not run them
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "models", "build", "docs", "__pycache__", ".*_cache", ".hypothesis")


def run_tests(tree: Path, tests: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run pytest on a copy of the repository."""
    path = os.pathsep.join([str(tree), str(tree / "kernels")])
    options = ("-q", "-x", "-p", "no:cacheprovider", f"--timeout={HANG_S}", "-o", "timeout_method=thread")
    return subprocess.run(
        [sys.executable, "-B", "-m", "pytest", *options, *tests],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def check(mutant: Mutant, trees: "queue.Queue[Path]") -> str:
    """The outcome of a mutant: "killed", or what is wrong with it."""
    tree = trees.get()
    source = tree / mutant.path
    original = source.read_text(encoding="utf-8")
    try:
        source.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
        done = run_tests(tree, [mutant.test])
    finally:
        source.write_text(original, encoding="utf-8")
        trees.put(tree)
    if done.returncode == TESTS_FAILED or "Timeout" in done.stdout + done.stderr:
        return "killed"
    if done.returncode == 0:
        return f"SURVIVED {mutant.test}"
    return f"COULD NOT BE TESTED, pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def main() -> int:
    """Print a line for each mutant; the exit status is 0 if all were killed."""
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="colm-mutants-") as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for number in range(len(os.sched_getaffinity(0))):
            tree = Path(folder) / str(number)
            shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
            trees.put(tree)
        sound = run_tests(Path(folder) / "0", sorted({mutant.test for mutant in MUTANTS}))
        if sound.returncode != 0:
            sys.stdout.write(f"without a mutation the tests must pass:\n{sound.stdout}{sound.stderr}")
            return 1
        with ThreadPoolExecutor(trees.qsize()) as threads:
            results = threads.map(lambda mutant: check(mutant, trees), MUTANTS)
            num_left = 0
            for number, (mutant, result) in enumerate(zip(MUTANTS, results, strict=True), start=1):
                num_left += result != "killed"
                sys.stdout.write(f"[{number}/{len(MUTANTS)}] {mutant.name}: {result}\n")
                sys.stdout.flush()
    seconds = time.monotonic() - started_s
    sys.stdout.write(f"{len(MUTANTS) - num_left} of {len(MUTANTS)} mutants killed in {seconds:.0f} s\n")
    return int(num_left > 0)


if __name__ == "__main__":
    sys.exit(main())
