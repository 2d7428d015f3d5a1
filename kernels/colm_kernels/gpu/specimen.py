"""What the ahead-of-time compiler needs to know of a kernel: types, alignment and constants as at a launch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

Arch = Literal[80, 90]
ARCHS: Final[tuple[Arch, ...]] = (80, 90)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Block sizes of a kernel, as its constants of these names, and how it is launched."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int

    def launch_options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True, kw_only=True, slots=True)
class Specimen:
    """One compilation of a kernel for one architecture."""

    kernel: Any
    """The function under `triton.jit`."""
    name: str
    arch: Arch
    signature: Mapping[str, str]
    """Triton's type of every argument that is no constant; pointers and, of the integers, those in `aligned` are
    multiples of 16, as at a launch on tensors of the allocator with head dims and widths that are."""
    constants: Mapping[str, Any]
    config: Config
    aligned: frozenset[str] = frozenset()
    tensor_cores: bool = True
    """Whether the code must hold tensor-core instructions; small operations and merges multiply no matrices."""
    wgmma: bool = True
    """Whether sm_90 must use wgmma, which takes 64 rows at least: decode has fewer, and uses mma.sync."""

    loads_elements: bool = False
    """Whether single elements may be loaded, as a key's scale is; rows must be loaded 16 bytes at a time."""

    @property
    def settings(self) -> str:
        """The constants in short, with warps and stages."""
        constants = {**self.constants, **self.config.blocks}
        listed = " ".join(f"{name}={int(value)}" for name, value in constants.items())
        return f"{listed} warps={self.config.num_warps} stages={self.config.num_stages}".strip()


def power_of_two(least: int) -> int:
    """The smallest that is no less: what a block's side must be."""
    return 1 << (least - 1).bit_length()
