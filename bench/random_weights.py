"""Weights that no training made: as large as a model's, and of a size that keeps activations near one."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from zlib import crc32

import torch
from torch import Tensor

from colm.checkpoint import Checkpoint, TextConfig, WeightSource
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


@dataclass(frozen=True, slots=True)
class RandomCheckpoint(Checkpoint):
    """A checkpoint that was never on disk, for what reads weights from nothing else."""

    weights: WeightSource

    @classmethod
    def of(cls, name: str, weights: WeightSource) -> Self:
        """Named like the preset that it has the shape of."""
        return cls(path=Path(name), config=weights.config, text=TextConfig(), weights=weights)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The source's."""
        return self.weights.tensors(names)
