"""Rotary position embedding (Su et al. 2021) in the half-split layout of Hugging Face LLaMA.

Shapes: T tokens, N heads, D head dim.
"""

import math
from typing import Final

import torch
from torch import Tensor

from colm.model.config import ChainConfig, RopeScaling
from colm.placement import CPU

KEPT_POSITIONS: Final = 32 << 10
"""Most positions whose tables are kept: 16 MiB at head dim 64. A longer prompt spends its time on attention."""


class Rope:
    """A model's rotary tables, of whatever positions are asked for."""

    def __init__(self, config: ChainConfig, device: torch.device = CPU) -> None:
        scaling = config.rope_scaling
        self._kept = torch.empty(2, 0, config.head_dim, device=device)
        self._inverse_frequencies = inverse_frequencies(config).to(device)
        self._factor = 1.0 if scaling is None else scaling.rotation_factor

    def tables(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """(cos_TD, sin_TD) in fp32 of absolute positions; both halves of D hold the same angles.

        YaRN's attention factor is in them, so that every rotation of queries and keys applies it.

        Args:
            positions_T: on the device of the tables.
        """
        angles = positions_T.to(torch.float32).unsqueeze(1) * self._inverse_frequencies
        angles_TD = torch.cat((angles, angles), dim=1)
        return angles_TD.cos().mul_(self._factor), angles_TD.sin().mul_(self._factor)

    def range(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """`tables` of the positions [start, stop).

        Those of the first `KEPT_POSITIONS` are kept once they have been asked for, since every layer of every prompt
        asks for them again.
        """
        device = self._inverse_frequencies.device
        if stop > KEPT_POSITIONS:
            return self.tables(torch.arange(start, stop, device=device))
        if stop > (num_kept := self._kept.shape[1]):
            # Twice as many each time, so that a growing prompt makes few copies.
            num_wanted = min(max(stop, 2 * num_kept), KEPT_POSITIONS)
            added = torch.stack(self.tables(torch.arange(num_kept, num_wanted, device=device)))
            self._kept = torch.cat((self._kept, added), dim=1)
        cos_TD, sin_TD = self._kept[:, start:stop]
        return cos_TD, sin_TD


def inverse_frequencies(config: ChainConfig) -> Tensor:
    """Angular step per token of each of the D/2 planes, fp32; computed on the CPU, so the same bits on any device."""
    with torch.device("cpu"):
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        frequencies = 1.0 / config.rope_theta**exponents
        match config.rope_scaling:
            case None:
                return frequencies
            case RopeScaling(kind="linear", factor=factor):
                return frequencies / factor
            case RopeScaling(kind="llama3") as scaling:
                return _llama3(frequencies, scaling)
            case RopeScaling() as scaling:
                return _yarn(frequencies, scaling, config.rope_theta)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow planes are interpolated, fast ones kept, those between the two wavelengths blended."""
    wavelengths = 2 * math.pi / frequencies
    longest = scaling.original_max_context / scaling.low_freq_factor
    shortest = scaling.original_max_context / scaling.high_freq_factor
    span = scaling.high_freq_factor - scaling.low_freq_factor
    blend = (scaling.original_max_context / wavelengths - scaling.low_freq_factor) / span
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    scaled = torch.where(wavelengths > longest, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < shortest, frequencies, scaled)


def _yarn(frequencies: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """Slow planes are interpolated, fast ones kept, those between blended along their numbers.

    The paper's ramp runs along the frequencies; its authors' code, and every other since, has it along the planes.
    """
    num_planes = len(frequencies)

    def plane_of(num_turns: float) -> float:
        """Where the plane would be that turns so often in the original context."""
        return num_planes * math.log(scaling.original_max_context / (2 * math.pi * num_turns), theta)

    first, last = plane_of(scaling.beta_fast), plane_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * num_planes - 1)
    # Where both bounds are beyond the same end, there is a step in place of the ramp.
    interpolated = ((torch.arange(num_planes) - first) / max(last - first, 1e-3)).clamp(0, 1)
    return frequencies * (1 - interpolated) + frequencies / scaling.factor * interpolated
