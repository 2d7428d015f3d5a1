"""Specimens: a kernel's types, alignments and constants as at a launch, for compilation ahead of time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

Arch = Literal[80, 90]
ARCHS: Final[tuple[Arch, ...]] = (80, 90)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A kernel's block sizes, by the names of its constants, with the warps and stages of a launch."""

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
    """Triton's type of every argument that is no constant. Pointers, and the integers named in `aligned`, are multiples
    of 16, as they are at a launch where head dims and widths are."""
    constants: Mapping[str, Any]
    config: Config
    aligned: frozenset[str] = frozenset()
    tensor_cores: bool = True
    """Whether the code must have tensor-core instructions; small operations and merges multiply no matrices."""
    wgmma: bool = True
    """Whether sm_90 must use wgmma, which takes at least 64 rows; with fewer, mma.sync is used."""

    loads_elements: bool = False
    """Whether single elements may be loaded, e.g. a key's scale; otherwise all loads must be wider."""

    @property
    def settings(self) -> str:
        """The constants, warps and stages in one line."""
        constants = {**self.constants, **self.config.blocks}
        listed = " ".join(f"{name}={int(value)}" for name, value in constants.items())
        return f"{listed} warps={self.config.num_warps} stages={self.config.num_stages}".strip()


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least `least`; a block's sides must be powers of two."""
    return 1 << (least - 1).bit_length()
