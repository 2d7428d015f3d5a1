"""The plain PyTorch model: the oracle that every node and kernel is held against."""

from colm.model.transformer import ChainTransformer, parameter_shapes

__all__ = ["ChainTransformer", "parameter_shapes"]
