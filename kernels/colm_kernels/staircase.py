"""The operands of Linear (chain)."""

from collections.abc import Sequence

from torch import Tensor

Staircase = tuple[Sequence[Tensor], Sequence[Tensor] | None, Sequence[int]]
"""(weights, biases, chain_rows) of `chain_linear.chain_linear`."""
