"""COLM_KERNELS_VARIANT runs a whole process, such as the tests, with one variant of the kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from colm_kernels import native

ROOT = Path(__file__).parents[2]

# The module reads the variable when it is imported: one process, which imports it anew for each value, shows all.
SHOW = """
import importlib, json, os, sys
import torch
os.environ.pop("COLM_KERNELS_VARIANT", None)
from colm_kernels import native
x = torch.empty(1, 64, dtype=torch.bfloat16)
shown = []
for value in json.loads(sys.argv[1]):
    os.environ.pop("COLM_KERNELS_VARIANT", None)
    os.environ |= {} if value is None else {"COLM_KERNELS_VARIANT": value}
    importlib.reload(native)
    try:
        chosen = native.default_variant(x.dtype), native.choose_memory_bound_variant(64, x)
        shown.append([list(native.available_variants()), *chosen])
    except ValueError as err:
        shown.append(str(err))
print(json.dumps(shown))
"""
Shown = dict[str | None, list[object] | str]


@pytest.fixture(scope="module")
def shown() -> Shown:
    """By the variable's value: all variants, and those that are chosen; or an error."""
    values = [None, "", "sse2", *native.available_variants()]
    command = [sys.executable, "-c", SHOW, json.dumps(values)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    return dict(zip(values, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("variant", native.available_variants())
def test_a_forced_variant_is_the_only_one_beside_pytorch(shown: Shown, variant: str) -> None:
    expected = ["torch"] if variant == "torch" else ["torch", variant]
    assert shown[variant] == [expected, variant, variant]


def test_a_variant_that_cannot_run_here_is_refused_with_those_that_can(shown: Shown) -> None:
    assert "COLM_KERNELS_VARIANT='sse2' is not one of ('torch'" in shown["sse2"]


WITHOUT = """
import sys
from pathlib import Path
import pytest
from colm_kernels import native
native.LIBRARY_PATH = Path("nowhere.so")
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/unit/test_sparse_lines.py"]))
"""


@pytest.mark.parametrize(("variant", "status"), [("", pytest.ExitCode.USAGE_ERROR), ("torch", pytest.ExitCode.OK)])
def test_without_the_library_no_test_is_left_out_unless_the_run_wants_none(variant: str, status: int) -> None:
    """Bug: tests of the library were skipped where nobody had built it, and the run was green."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        cwd=ROOT,
        env=os.environ | {"COLM_KERNELS_VARIANT": variant},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == status, said
    assert ("skipped" if variant else "run `python kernels/build.py`, or set COLM_KERNELS_VARIANT=torch") in said


def test_an_empty_variable_forces_nothing(shown: Shown) -> None:
    assert shown[""] == shown[None]
    assert set(native.available_variants()) <= set(shown[None][0])
