"""The same model with its features in another order: it computes the same, and no group of weights is as it was.

The features of a chain's hidden states, of its feed-forward and of the values of a kv head may stand in any order if
all that makes them and all that reads them agrees. Weights that were quantised once, in groups along their inputs, then
meet groups of other neighbours, as weights that never were quantised do.
"""

import os
from itertools import accumulate

import torch
from torch import Tensor

from colm.checkpoint import Checkpoint, save
from colm.errors import UnsupportedModel
from colm.model import parameter_shapes


def reorder(src: Checkpoint, dest: str | os.PathLike[str], *, seed: int = 0) -> Checkpoint:
    """Write a checkpoint in another order of features.

    Args:
        src: of gated layers without biases, whose keys and values are chain 1's.
        dest: directory to write.
        seed: of the order.

    Raises:
        UnsupportedModel: the model is of another kind.
    """
    config = src.config
    if config.bias or config.activation != "swiglu" or not config.kv_sharing:
        raise UnsupportedModel(f"{src.path}: only gated models without biases whose keys are chain 1's are reordered")
    generator = torch.Generator().manual_seed(seed)

    def orders(dims: tuple[int, ...]) -> list[Tensor]:
        return [torch.randperm(dim, generator=generator) for dim in dims]

    model, num_kv_heads, head_dim = orders(config.chain_dims), config.num_kv_heads, config.head_dim
    hidden = [orders(config.chain_hidden_dims) for _ in range(config.num_layers)]
    values = [orders((head_dim,) * num_kv_heads) for _ in range(config.num_layers)]

    def value_rows(layer: int) -> Tensor:
        return _side_by_side(values[layer])

    def attended(layer: int, chain: int) -> Tensor:
        """Of a chain's query heads, each in the order of the kv head that it reads."""
        group = config.chains[chain] // num_kv_heads
        return _side_by_side([values[layer][head // group] for head in range(config.chains[chain])])

    def converted(name: str, weight: Tensor) -> Tensor:
        parts = name.split(".")
        chain = int(parts[-1].removeprefix("chain")) - 1
        if parts[0] != "layers":
            return weight[..., model[chain]]  # tables and the final norm
        layer, kind = int(parts[1]), parts[-2]
        if kind in ("attention_norm", "ffn_norm"):
            return weight[model[chain]]
        if kind == "wo":
            return weight[model[chain]][:, _side_by_side([attended(layer, each) for each in range(chain + 1)])]
        if kind == "down":
            return weight[model[chain]][:, _side_by_side(hidden[layer][: chain + 1])]
        weight = weight[:, _side_by_side(model[: chain + 1])]
        if kind == "wv":
            return weight[value_rows(layer)]
        return weight[hidden[layer][chain]] if kind in ("gate", "up") else weight

    names = parameter_shapes(config)
    tensors = {name: converted(name, src.tensors([name])[name]).contiguous() for name in names}
    return save(dest, config, tensors, text=src.text, tokenizer_json=src.tokenizer_json())


def _side_by_side(orders: list[Tensor]) -> Tensor:
    """One order of features that stand side by side."""
    starts = accumulate((len(order) for order in orders), initial=0)
    return torch.cat([start + order for start, order in zip(starts, orders, strict=False)])
