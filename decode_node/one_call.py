"""A model's weights and a store's pages as the kernels' library takes them, for whole steps in one call."""

from collections.abc import Sequence

from colm_kernels.decode_step import DecodeStep, Matrices, StepLayer
from torch import Tensor

from colm.model import ChainTransformer
from colm.model.block import ChainBlock
from colm.model.linear import ChainLinear
from colm.model.norm import ChainRMSNorm
from decode_node.kv_store import KvStore


def step_in_one_call(model: ChainTransformer, store: KvStore) -> DecodeStep | None:
    """The model's layers over the store's pages; None on a GPU, and where the feed-forward is not gated.

    Args:
        model: all chains, contiguous and in the store's dtype; it must not move afterwards.
        store: the pages.
    """
    config, blocks = model.config, model.blocks
    if store.device.type != "cpu" or not blocks[0].ffn.is_gated:
        return None
    return DecodeStep(
        [_layer(block) for block in blocks],
        _gains(model.final_norm),
        config.chains,
        store.k_pages_LBPKD,
        store.v_pages_LBPKD,
        eps=config.norm_eps,
    )


def _layer(block: ChainBlock) -> StepLayer:
    attention, ffn = block.attention, block.ffn
    return StepLayer(
        attention_gains=_gains(block.attention_norm),
        queries=_matrices(attention.wq),
        keys=_matrices(attention.wk),
        values=_matrices(attention.wv),
        output=_matrices(attention.wo),
        ffn_gains=_gains(block.ffn_norm),
        gate=_matrices(ffn.gate),
        up=_matrices(ffn.up),
        down=_matrices(ffn.down),
    )


def _gains(norm: ChainRMSNorm) -> Sequence[Tensor]:
    return norm.gains(len(norm.names))


def _matrices(linear: ChainLinear) -> Matrices:
    num_chains = len(linear.names)
    return linear.weights(num_chains), linear.biases(num_chains)
