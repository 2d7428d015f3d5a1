"""Linear (chain) as a module: one weight tensor a chain.

Shapes: R rows, I input features of the active chains, O output features of the active chains.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from colm_kernels.chain_linear import chain_linear
from torch import Tensor, nn


class ChainLinear(nn.Module):
    """y_i = W_i x_{1..i}: output chain i reads input chains 1..i only.

    Parameters are named `chain1`, `chain2`, ...: block i has shape (out_dims[i], in_dims[0] + .. + in_dims[i]).
    With one chain this is an ordinary Linear without bias.
    """

    def __init__(self, in_dims: Sequence[int], out_dims: Sequence[int]) -> None:
        super().__init__()
        self.names = [f"chain{chain + 1}" for chain in range(len(in_dims))]
        for name, out_dim, width in zip(self.names, out_dims, accumulate(in_dims), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(out_dim, width)))

    def weights(self, num_chains: int) -> list[Tensor]:
        """The blocks of the first `num_chains` chains."""
        return [self.get_parameter(name) for name in self.names[:num_chains]]

    def forward(self, x_RI: Tensor, chain_rows: Sequence[int]) -> Tensor:
        """Apply the staircase; `chain_rows` as in `colm_kernels.chain_linear`."""
        return chain_linear(x_RI, self.weights(len(chain_rows)), None, chain_rows)
