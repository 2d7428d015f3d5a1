"""Random weights for software whose speed alone is looked at."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from colm.model import parameter_shapes
from colm.model.config import ChainConfig

_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class RepeatedWeights:
    """One block of random numbers, over and over: gigabytes of `bench.random_weights` take half a minute to make.

    A `WeightSource`. Gains are one; activations stay near one.
    """

    config: ChainConfig
    dtype: torch.dtype
    seed: int

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, made anew."""
        shapes = parameter_shapes(self.config)
        block = torch.empty(_BLOCK).normal_(generator=torch.Generator().manual_seed(self.seed))
        return {name: self._tensor(name, shapes[name], block) for name in names}

    def _tensor(self, name: str, shape: torch.Size, block: Tensor) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype)
        scaled = block if name.startswith("embedding.") else block / math.sqrt(shape[1])
        flat = torch.empty(shape.numel(), dtype=self.dtype)
        for start in range(0, len(flat), _BLOCK):
            part = flat[start : start + _BLOCK]
            part.copy_(scaled[: len(part)])
        return flat.view(shape)
