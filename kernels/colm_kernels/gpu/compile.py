"""Compiles every kernel ahead of time for sm_80 and sm_90, without a GPU, and prints what each takes of a GPU.

python -m colm_kernels.gpu.compile            # the table of kernels/README.md
python -m colm_kernels.gpu.compile --json     # the same, a record a specimen
python -m colm_kernels.gpu.compile --write    # puts the table into kernels/README.md
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from colm_kernels.gpu import (
    chain_linear,
    decode_attention,
    kv_quantise,
    prefill_attention,
    rms_norm,
    rotary,
    sparse_prefill_attention,
    swiglu,
)
from colm_kernels.gpu.specimen import Arch, Specimen

README: Final = Path(__file__).parents[2] / "README.md"
BEGIN: Final = "<!-- python -m colm_kernels.gpu.compile --write -->\n"
END: Final = "<!-- end -->\n"

OPERATIONS: Final = (
    prefill_attention,
    sparse_prefill_attention,
    decode_attention,
    chain_linear,
    rms_norm,
    rotary,
    swiglu,
    kv_quantise,
)

MAX_SHARED_BYTES: Final[dict[Arch, int]] = {80: 163 << 10, 90: 227 << 10}
"""Shared memory that one block of threads may take on an A100 and on an H100."""
MAX_REGISTERS: Final = 1 << 16
"""Registers of one multiprocessor, which a block's threads share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What the compiler reports of one specimen."""

    kernel: str
    arch: Arch
    config: str
    num_warps: int
    registers: int
    """Registers of one thread."""
    local_bytes: int
    """Stack and local memory of one thread: what was spilled."""
    shared_bytes: int
    mma_sync: int
    wgmma: int
    """Tensor-core instructions in the PTX."""
    element_loads: int
    """Loads of one element of 1 or 2 bytes in the PTX; a row of unknown alignment is loaded by these."""
    needs_mma: bool
    needs_wgmma: bool
    may_load_elements: bool

    def faults(self) -> list[str]:
        """The limits that it exceeds and the demands that it misses, one message each."""
        threads = 32 * self.num_warps
        bars = {
            f"{self.local_bytes} bytes spilled": self.local_bytes == 0,
            f"{self.shared_bytes} bytes of shared memory": self.shared_bytes <= MAX_SHARED_BYTES[self.arch],
            f"{self.registers} registers in each of {threads} threads": self.registers * threads <= MAX_REGISTERS,
            "no tensor-core instruction": self.mma_sync + self.wgmma > 0 or not self.needs_mma,
            "no wgmma": self.wgmma > 0 or not self.needs_wgmma,
            f"{self.element_loads} loads of one element": self.element_loads == 0 or self.may_load_elements,
        }
        return [f"{self.kernel} sm_{self.arch} {self.config}: {fault}" for fault, holds in bars.items() if not holds]


@cache
def _specimens() -> tuple[Specimen, ...]:
    return tuple(specimen for operation in OPERATIONS for specimen in operation.specimens())


def _compile(number: int) -> Report:
    specimen = _specimens()[number]
    names = specimen.kernel.arg_names
    constants = {**specimen.constants, **specimen.config.blocks}
    signature = {name: "constexpr" if name in constants else specimen.signature[name] for name in names}
    source = ASTSource(
        fn=specimen.kernel,
        signature=signature,
        constexprs=constants,
        attrs={
            (at,): [["tt.divisibility", 16]]
            for at, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or name in specimen.aligned
        },
    )
    options = {
        "num_warps": specimen.config.num_warps,
        "num_stages": specimen.config.num_stages,
        "enable_fp_fusion": True,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", specimen.arch, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Report(
        kernel=specimen.name,
        arch=specimen.arch,
        config=specimen.settings,
        num_warps=specimen.config.num_warps,
        registers=usage["REG"],
        local_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        mma_sync=len(re.findall(r"\bmma\.sync", ptx)),
        wgmma=len(re.findall(r"\bwgmma\.mma_async", ptx)),
        element_loads=len(re.findall(r"\bld\.global\.\w*(?:8|16)\b", ptx)),
        needs_mma=specimen.tensor_cores,
        needs_wgmma=specimen.tensor_cores and specimen.wgmma and specimen.arch >= 90,
        may_load_elements=specimen.loads_elements,
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout)}


def reports() -> list[Report]:
    """Compile every specimen, on every core."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile, range(len(_specimens()))))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1024:g} KiB" if num_bytes >= 1024 else f"{num_bytes} B"


def table(made: Sequence[Report]) -> str:
    """The reports as a table in Markdown."""
    lines = [
        f"Triton {triton.__version__}:",
        "",
        "| kernel | arch | config | registers | spilled | shared memory | tensor-core instructions |",
        "|---|---|---|---|---|---|---|",
    ]
    for report in made:
        counts = {"mma.sync": report.mma_sync, "wgmma": report.wgmma}
        used = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"
        lines.append(
            f"| {report.kernel} | sm_{report.arch} | {report.config} | {report.registers} | {report.local_bytes} B | "
            f"{_size(report.shared_bytes)} | {used} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print and perhaps write the table; exit status 1 if any specimen has a fault."""
    parser = argparse.ArgumentParser(prog="python -m colm_kernels.gpu.compile", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="records instead of the table")
    parser.add_argument("--write", action="store_true", help="put the table into kernels/README.md")
    options = parser.parse_args(arguments)
    made = reports()
    sys.stdout.write(json.dumps([asdict(report) for report in made]) + "\n" if options.json else table(made))
    if options.write:
        before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        README.write_text(before + BEGIN + table(made) + END + after, encoding="utf-8")
    faults = [fault for report in made for fault in report.faults()]
    sys.stderr.writelines(f"{fault}\n" for fault in faults)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
