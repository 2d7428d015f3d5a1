"""COLM_KERNELS_VARIANT runs a whole process, such as the tests, with one variant of the kernels."""

import json
import subprocess
import sys

import pytest
from colm_kernels import native

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


def test_an_empty_variable_forces_nothing(shown: Shown) -> None:
    assert shown[""] == shown[None]
    assert set(native.available_variants()) <= set(shown[None][0])
