"""The plain PyTorch model: the oracle that every node and kernel is compared with."""

from colm.model.transformer import ChainTransformer, num_parameters, parameter_shapes

__all__ = ["ChainTransformer", "num_parameters", "parameter_shapes"]
