"""Feed-forward (chain), SwiGLU or GELU.

Shapes: R rows, D model features of the active chains.
"""

from collections.abc import Sequence

from colm_kernels.chain_linear import swiglu_linear
from torch import Tensor, nn
from torch.nn import functional as F

from colm.model.config import ChainConfig
from colm.model.linear import ChainLinear


class ChainFFN(nn.Module):
    """SwiGLU (Shazeer 2020), down(silu(gate(x)) * up(x)), or down(gelu(up(x))); all linears are Linear (chain)."""

    def __init__(self, config: ChainConfig) -> None:
        super().__init__()
        self.is_gated = config.activation == "swiglu"
        if self.is_gated:
            self.gate = ChainLinear(config.chain_dims, config.chain_hidden_dims, bias=config.bias)
        self.up = ChainLinear(config.chain_dims, config.chain_hidden_dims, bias=config.bias)
        self.down = ChainLinear(config.chain_hidden_dims, config.chain_dims, bias=config.bias)

    def forward(self, x_RD: Tensor, chain_rows: Sequence[int]) -> Tensor:
        """Chains side by side, without gradients; `chain_rows` as in `colm_kernels.chain_linear`."""
        if self.is_gated:
            hidden = swiglu_linear(x_RD, self.gate.operands(chain_rows), self.up.operands(chain_rows))
        else:
            hidden = F.gelu(self.up(x_RD, chain_rows))
        result: Tensor = self.down(hidden, chain_rows)
        return result

    def by_chain(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """The oracle, one tensor a chain, differentiable; it shares no code with `forward`."""
        ups = self.up.by_chain(xs)
        if self.is_gated:
            hidden = [F.silu(gate) * up for gate, up in zip(self.gate.by_chain(xs), ups, strict=True)]
        else:
            hidden = [F.gelu(up) for up in ups]
        return self.down.by_chain(hidden)
