"""SwiGLU feed-forward (chain).

Shapes: R rows, D model features of the active chains.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from colm.config import ChainConfig
from colm.model.linear import ChainLinear


class ChainSwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020), with all three linears Linear (chain)."""

    def __init__(self, config: ChainConfig) -> None:
        super().__init__()
        self.gate = ChainLinear(config.chain_dims, config.chain_hidden_dims)
        self.up = ChainLinear(config.chain_dims, config.chain_hidden_dims)
        self.down = ChainLinear(config.chain_hidden_dims, config.chain_dims)

    def forward(self, x_RD: Tensor, chain_rows: Sequence[int]) -> Tensor:
        """Apply to normalised hidden states; `chain_rows` as in `colm_kernels.chain_linear`."""
        hidden = F.silu(self.gate(x_RD, chain_rows), inplace=not self.training).mul_(self.up(x_RD, chain_rows))
        result: Tensor = self.down(hidden, chain_rows)
        return result
