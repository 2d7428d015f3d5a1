"""Linear (chain) as a module: one weight tensor a chain, and one bias where it has one.

Shapes: R rows, I input features of the active chains, O output features of the active chains.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from colm_kernels.chain_linear import chain_linear, chain_linear_by_chain
from colm_kernels.staircase import Staircase
from torch import Tensor, nn

from colm.model.weights import ChainWeights


class ChainLinear(ChainWeights):
    """y_i = W_i x_{1..i} + b_i: output chain i reads input chains 1..i only.

    Parameters are named `chain1`, `chain2`, ...: block i has shape (out_dims[i], in_dims[0] + .. + in_dims[i]);
    its bias is `chain1_bias`, ... With one chain this is an ordinary Linear.
    """

    def __init__(self, in_dims: Sequence[int], out_dims: Sequence[int], *, bias: bool = False) -> None:
        super().__init__()
        self.names = [f"chain{chain + 1}" for chain in range(len(in_dims))]
        self.has_bias = bias
        for name, out_dim, width in zip(self.names, out_dims, accumulate(in_dims), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(out_dim, width)))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(out_dim)))

    def biases(self, num_chains: int) -> list[Tensor] | None:
        """The biases of the first `num_chains` chains; None where there are none."""
        return [self.get_parameter(f"{name}_bias") for name in self.names[:num_chains]] if self.has_bias else None

    def forward(self, x_RI: Tensor, chain_rows: Sequence[int]) -> Tensor:
        """Chains side by side in one tensor, as the nodes run it; `chain_rows` as in `colm_kernels.chain_linear`."""
        return chain_linear(x_RI, *self.operands(chain_rows))

    def operands(self, chain_rows: Sequence[int]) -> Staircase:
        """What `colm_kernels.chain_linear` takes beside x."""
        num_chains = len(chain_rows)
        return self.weights(num_chains), self.biases(num_chains), chain_rows

    def by_chain(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """One tensor a chain, differentiable, as the oracle and training run it."""
        return chain_linear_by_chain(xs, self.matrices(len(xs)), self.biases(len(xs)))
