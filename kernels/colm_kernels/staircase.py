"""The operands of Linear (chain)."""

from collections.abc import Sequence
from typing import TypeGuard

from torch import Tensor

from colm_kernels.panels import Panels
from colm_kernels.quantised import QuantisedPanels

LaidOut = Panels | QuantisedPanels
"""A weight in panels, as it was stored or quantised."""

Weights = Sequence[Tensor | LaidOut]
"""Of a linear, one a chain: all as weight_OI, or all in panels."""

Staircase = tuple[Weights, Sequence[Tensor] | None, Sequence[int]]
"""(weights, biases, chain_rows) of `chain_linear.chain_linear`."""


def all_in_panels(weights: Weights) -> TypeGuard[Sequence[LaidOut]]:
    """Whether these weights are in panels; of one linear all are, or none is."""
    return len(weights) > 0 and not isinstance(weights[0], Tensor)


def any_quantised(weights: Weights) -> bool:
    """Whether some of these weights are quantised."""
    return any(isinstance(weight, QuantisedPanels) for weight in weights)


def as_rows(weights: Weights) -> Sequence[Tensor]:
    """Weights as tensors weight_OI; copies of those in panels."""
    return [weight if isinstance(weight, Tensor) else weight.rows() for weight in weights]


def memory_of(weight: Tensor | LaidOut) -> Tensor:
    """The tensor that holds a weight, however it lies."""
    return weight if isinstance(weight, Tensor) else weight.stored


def format_of(weight: Tensor | LaidOut) -> int:
    """`WeightFormat` of abi.h."""
    return 0 if isinstance(weight, Tensor) else weight.format_id
