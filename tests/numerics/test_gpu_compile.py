"""Every Triton kernel, compiled for sm_80 and sm_90 without a GPU: its limits, and the table of its figures."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from colm_kernels.gpu.compile import BEGIN, END, README, Report, table
from colm_kernels.gpu.specimen import ARCHS


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    """The compiler's reports, from a process of its own: in this one, kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "colm_kernels.gpu.compile", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout, done.stderr
    return [Report(**record) for record in json.loads(done.stdout)]


def test_every_kernel_fits_its_processor_without_spilling_and_multiplies_on_tensor_cores(reports: list[Report]) -> None:
    assert [fault for report in reports for fault in report.faults()] == []


def test_every_kernel_is_compiled_for_both_architectures(reports: list[Report]) -> None:
    kernels = {arch: {report.kernel for report in reports if report.arch == arch} for arch in ARCHS}
    assert kernels[80] == kernels[90]
    assert len(kernels[80]) > 0


def test_the_table_in_the_readme_is_what_the_compiler_says(reports: list[Report]) -> None:
    written = README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert written == table(reports), (
        "run python -m colm_kernels.gpu.compile --write with the Triton of requirements.txt"
    )


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"local_bytes": 8}, "8 bytes spilled"),
        ({"shared_bytes": 170_000}, "170000 bytes of shared memory"),
        ({"registers": 255, "num_warps": 16}, "255 registers in each of 512 threads"),
        ({"element_loads": 32}, "32 loads of one element"),
        ({"mma_sync": 0}, "no tensor-core instruction"),
        ({"arch": 90, "needs_wgmma": True}, "no wgmma"),
    ],
)
def test_a_missed_bar_is_named(change: dict[str, Any], fault: str) -> None:
    record = {
        "kernel": "k", "arch": 80, "config": "D=64", "num_warps": 4, "registers": 128, "local_bytes": 0,
        "shared_bytes": 1024, "mma_sync": 8, "wgmma": 0, "element_loads": 0, "needs_mma": True, "needs_wgmma": False,
        "may_load_elements": False,
    }  # fmt: skip
    assert Report(**record).faults() == []
    assert Report(**{**record, **change}).faults() == [f"k sm_{change.get('arch', 80)} D=64: {fault}"]
