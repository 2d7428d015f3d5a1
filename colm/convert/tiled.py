"""The paper's order of query heads under KV sharing, and ours.

The paper tiles the kv heads: query head h of the whole layer reads kv head h mod K. We group them, as LLaMA does:
query head j of a chain of c heads reads kv head j // (c / K). Each chain is a multiple of K, so tiling starts anew
at each chain, and one permutation inside each chain turns the one into the other.
"""

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from colm.checkpoint import Checkpoint, save
from colm.model.config import ChainConfig


def from_tiled(src: str | os.PathLike[str], dest: str | os.PathLike[str]) -> Checkpoint:
    """Turn a checkpoint whose query heads are in the paper's tiled order into one that computes the same.

    Args:
        src: a checkpoint directory, ours in everything but the order of heads.
        dest: directory to write; an older checkpoint there is replaced.

    Returns:
        The saved checkpoint, in the source's dtype.

    Raises:
        CheckpointError: `src` is not a checkpoint.
    """
    source = Checkpoint.open(src)
    tensors = dict(source.load().named_parameters())
    grouped = group_heads(source.config, tensors)
    return save(dest, source.config, grouped, text=source.text, tokenizer_json=source.tokenizer_json())


def group_heads(config: ChainConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reorder query heads from tiled to grouped: rows of `wq`, columns of `wo`, inside each chain.

    Without KV sharing the paper groups too, and nothing moves.
    """
    if not config.kv_sharing:
        return dict(tensors)
    orders = [_grouped_order(chain, config.num_kv_heads, config.head_dim) for chain in config.chains]
    starts = [sum(config.chain_query_dims[:chain]) for chain in range(config.num_chains)]
    columns = torch.cat([start + order for start, order in zip(starts, orders, strict=True)])
    grouped = dict(tensors)
    for name, tensor in tensors.items():
        if ".attention.wq." in name:
            chain = int(name.rsplit(".chain", 1)[1].removesuffix("_bias"))
            grouped[name] = tensor[orders[chain - 1]]
        elif ".attention.wo." in name and tensor.dim() == 2:
            grouped[name] = tensor[:, columns[: tensor.shape[1]]]
    return grouped


def _grouped_order(num_heads: int, num_kv_heads: int, head_dim: int) -> Tensor:
    """For each query feature of a grouped chain, its place in the tiled one."""
    tiled = torch.arange(num_heads).view(-1, num_kv_heads)
    return (tiled.T.reshape(-1, 1) * head_dim + torch.arange(head_dim)).flatten()
