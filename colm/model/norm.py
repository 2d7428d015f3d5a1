"""RMSNorm (chain).

Shapes: R rows, D features of the active chains.
"""

from collections.abc import Sequence

import torch
from colm_kernels.rms_norm import add_rms_norm_, rms_norm, rms_norm_reference
from torch import Tensor, nn


class ChainRMSNorm(nn.Module):
    """Each chain is normalised by its own root mean square, with its own gain: `chain1`, `chain2`, ..."""

    def __init__(self, dims: Sequence[int], eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.names = [f"chain{chain + 1}" for chain in range(len(dims))]
        for name, dim in zip(self.names, dims, strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(dim)))

    def forward(self, x_RD: Tensor, num_chains: int) -> Tensor:
        """Normalise the first `num_chains` chains side by side in one tensor."""
        return rms_norm(x_RD, self.gains(num_chains), self.eps)

    def add_(self, x_RD: Tensor, delta_RD: Tensor, num_chains: int) -> Tensor:
        """Add delta to the residual stream x in place; the sum, normalised as by `forward`."""
        return add_rms_norm_(x_RD, delta_RD, self.gains(num_chains), self.eps)

    def gains(self, num_chains: int) -> list[Tensor]:
        """The gains of the first `num_chains` chains."""
        return [getattr(self, name) for name in self.names[:num_chains]]

    def by_chain(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """Normalise one tensor a chain: x / sqrt(mean(x^2) + eps) * gain, in fp32 or wider inside."""
        return [rms_norm_reference(x, [gain], self.eps) for x, gain in zip(xs, self.gains(len(xs)), strict=True)]
