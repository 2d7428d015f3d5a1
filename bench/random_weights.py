"""Weights that no training made: as large as a model's, and of a size that keeps activations near one."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from colm.model import parameter_shapes
from colm.model.config import ChainConfig


@dataclass(frozen=True, kw_only=True)
class RandomWeights:
    """A model that was never on disk; a `WeightSource`.

    A tensor depends on its name, shape and the seed alone, whatever else is asked for.
    """

    config: ChainConfig
    dtype: torch.dtype
    seed: int

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, made anew."""
        shapes = parameter_shapes(self.config)
        return {name: self._tensor(name, shapes[name]) for name in names}

    def _tensor(self, name: str, shape: torch.Size) -> Tensor:
        generator = torch.Generator().manual_seed(crc32(f"{self.seed} {name}".encode()))
        mean, deviation = 0.0, 1.0
        if "norm." in name:
            mean, deviation = 1.0, 0.1
        elif len(shape) == 2 and not name.startswith("embedding."):
            deviation = 1 / math.sqrt(shape[1])
        return torch.empty(shape, dtype=self.dtype).normal_(mean, deviation, generator=generator)
