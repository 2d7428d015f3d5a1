"""The operands of Linear (chain)."""

from collections.abc import Sequence

from torch import Tensor

from colm_kernels.panels import Panels

Weights = Sequence[Tensor | Panels]
"""Of a linear, one a chain: all as weight_OI, or all in panels."""

Staircase = tuple[Weights, Sequence[Tensor] | None, Sequence[int]]
"""(weights, biases, chain_rows) of `chain_linear.chain_linear`."""
