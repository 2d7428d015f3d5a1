"""The model: the plain oracle that every node and kernel is compared with, and the layers as nodes serve them."""

from colm.model.transformer import (
    ChainTransformer,
    num_parameters,
    num_step_parameters,
    parameter_shapes,
)

__all__ = ["ChainTransformer", "num_parameters", "num_step_parameters", "parameter_shapes"]
