"""A model's weights as the kernels' library takes them, to run whole layers in one call."""

from collections.abc import Sequence

import torch
from colm_kernels.decode_step import Matrices, StepLayer
from torch import Tensor

from colm.model.block import ChainBlock
from colm.model.linear import ChainLinear
from colm.model.norm import ChainRMSNorm
from colm.model.transformer import ChainTransformer


def step_layers(model: ChainTransformer, device: torch.device) -> list[StepLayer] | None:
    """The model's layers, all chains that were built; None on a GPU, and where the feed-forward is not gated.

    Args:
        model: its weights must not move as long as the layers are used. Those that were not loaded are on the meta
            device.
        device: of the model's other weights.
    """
    blocks = model.blocks
    return [_layer(block) for block in blocks] if device.type == "cpu" and blocks[0].ffn.is_gated else None


def all_gains(norm: ChainRMSNorm) -> Sequence[Tensor]:
    """The gains of every chain."""
    return norm.gains(len(norm.names))


def _layer(block: ChainBlock) -> StepLayer:
    attention, ffn = block.attention, block.ffn
    return StepLayer(
        attention_gains=all_gains(block.attention_norm),
        queries=_matrices(attention.wq),
        keys=_matrices(attention.wk),
        values=_matrices(attention.wv),
        output=_matrices(attention.wo),
        ffn_gains=all_gains(block.ffn_norm),
        gate=_matrices(ffn.gate),
        up=_matrices(ffn.up),
        down=_matrices(ffn.down),
    )


def _matrices(linear: ChainLinear) -> Matrices:
    num_chains = len(linear.names)
    return linear.weights(num_chains), linear.biases(num_chains)
