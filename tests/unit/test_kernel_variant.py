"""COLM_KERNELS_VARIANT runs a whole process, such as the tests, with one variant of the kernels."""

import os
import subprocess
import sys

import pytest
from colm_kernels import native

SHOW = """
import torch
from colm_kernels import native
x = torch.empty(1, 64, dtype=torch.bfloat16)
print(native.available_variants(), native.default_variant(x.dtype), native.choose_memory_bound_variant(64, x))
"""


def process(variant: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLM_KERNELS_VARIANT": variant}
    return subprocess.run([sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("variant", native.available_variants())
def test_a_forced_variant_is_the_only_one_beside_pytorch(variant: str) -> None:
    expected = ("torch",) if variant == "torch" else ("torch", variant)
    assert process(variant).stdout.strip() == f"{expected} {variant} {variant}"


def test_a_variant_that_cannot_run_here_is_refused_with_those_that_can() -> None:
    error = process("sse2").stderr
    assert "COLM_KERNELS_VARIANT='sse2' is not one of ('torch'" in error


def test_an_empty_variable_forces_nothing() -> None:
    free = {name: value for name, value in os.environ.items() if name != "COLM_KERNELS_VARIANT"}
    unset = subprocess.run([sys.executable, "-c", SHOW], env=free, capture_output=True, text=True, timeout=120)
    assert process("").stdout == unset.stdout != ""
