"""Rotary position embedding (Su et al. 2021) in the half-split layout of Hugging Face LLaMA.

Shapes: T tokens, N heads, D head dim.
"""

import math

import torch
from torch import Tensor

from colm.model.config import ChainConfig, RopeScaling
from colm.placement import CPU


def inverse_frequencies(config: ChainConfig, device: torch.device = CPU) -> Tensor:
    """Angular step per token of each of the D/2 planes, fp32; computed on the CPU, so the same bits on any device."""
    with torch.device("cpu"):
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        frequencies = 1.0 / config.rope_theta**exponents
    scaled = frequencies if config.rope_scaling is None else _scale(frequencies, config.rope_scaling)
    return scaled.to(device)


def _scale(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # llama3: slow planes are interpolated, fast ones kept, those between the two wavelengths blended.
    wavelengths = 2 * math.pi / frequencies
    longest = scaling.original_max_context / scaling.low_freq_factor
    shortest = scaling.original_max_context / scaling.high_freq_factor
    span = scaling.high_freq_factor - scaling.low_freq_factor
    blend = (scaling.original_max_context / wavelengths - scaling.low_freq_factor) / span
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    scaled = torch.where(wavelengths > longest, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < shortest, frequencies, scaled)


def rotation(inverse_frequencies: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """(cos_TD, sin_TD) in fp32 of the given absolute positions; both halves of D hold the same angles."""
    angles = positions_T.to(torch.float32).unsqueeze(1) * inverse_frequencies
    angles_TD = torch.cat((angles, angles), dim=1)
    return angles_TD.cos(), angles_TD.sin()
