"""Where a node computes, in what, and with how many threads, as its options name them."""

import re
from dataclasses import dataclass
from typing import Final, Self

import torch

from colm.allocator import keep_freed_memory
from colm.cpus import num_usable_cpus
from colm.dtypes import fastest_dtype, parse_dtype
from colm.errors import ConfigError

CPU: Final = torch.device("cpu")
_CUDA: Final = re.compile(r"cuda(?::(0|[1-9][0-9]?))?")


def parse_device(name: str) -> torch.device:
    """The device of a user's word: "cpu", "cuda:N", or "cuda", which is the first.

    Raises:
        ValueError: unknown name.
    """
    if name == "cpu":
        return CPU
    if (match := _CUDA.fullmatch(name)) is None:
        raise ValueError(f"device={name!r} is unknown; use cpu, cuda or cuda:N")
    return torch.device("cuda", int(match[1] or 0))


def why_unusable(device: torch.device) -> str | None:
    """Why nothing can compute on a device here, and the way out; None where it can."""
    if device.type != "cuda":
        return None
    if not torch.backends.cuda.is_built():
        return "this PyTorch is built without CUDA; install one that is built with it, or choose the CPU"
    if not torch.cuda.is_available():
        return (
            f"PyTorch finds no GPU: no driver that CUDA {torch.version.cuda} can use, no GPU, or none that "
            "CUDA_VISIBLE_DEVICES shows; see `nvidia-smi`, or choose the CPU"
        )
    if device.index >= (num_devices := torch.cuda.device_count()):
        return f"there is no such GPU among the {num_devices} here; the last is cuda:{num_devices - 1}"
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where a node computes, and in what."""

    device: torch.device
    """Of weights, activations, keys and values; CUDA with its index."""
    dtype: torch.dtype
    """Of weights, computation, keys and values."""
    num_threads: int | None = None
    """CPU threads; None takes every core this process may use."""

    @classmethod
    def of(cls, device: str, dtype: str, num_threads: int | None = None) -> Self:
        """The placement that a user's words name.

        Args:
            device: of `parse_device`.
            dtype: of `parse_dtype`, or "auto" for the fastest on that device.
            num_threads: as the field.

        Raises:
            ValueError: an unknown word.
        """
        place = parse_device(device)
        chosen = fastest_dtype(place) if dtype == "auto" else parse_dtype(dtype)
        return cls(device=place, dtype=chosen, num_threads=num_threads)

    def take(self) -> None:
        """Set this process's threads and what its allocator keeps, and see that the device is there.

        Raises:
            ConfigError: it is not; why, and the way out.
        """
        if (reason := why_unusable(self.device)) is not None:
            raise ConfigError(f"device={str(self.device)!r}: {reason}")
        torch.set_num_threads(self.num_threads or num_usable_cpus())
        keep_freed_memory()
