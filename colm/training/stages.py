"""Which parameters train, which are frozen, and one step of training.

A frozen chain costs nothing in the backward pass: its parameters require no gradient and it reads only frozen chains.
So its features carry no graph, nothing of it is kept, and no gradient of it is computed.
"""

import re
from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import Parameter

from colm.model import ChainTransformer
from colm.training.objective import ScaleLosses, scale_losses

_CHAIN = re.compile(r"\.chain(\d+)(?:_bias)?$")


def train_chains(model: ChainTransformer, *, num_frozen: int = 0) -> list[Parameter]:
    """Freeze the first `num_frozen` chains and train the others, head included.

    Returns:
        What trains, for the optimizer.

    Raises:
        ValueError: nothing would train.
    """
    if not 0 <= num_frozen < model.num_chains:
        raise ValueError(f"num_frozen={num_frozen} must be between 0 and {model.num_chains - 1}")
    return _train(model, [name for name, _ in model.named_parameters() if chain_of(name) > num_frozen])


def train_head(model: ChainTransformer) -> list[Parameter]:
    """Freeze everything but the head: the paper's second stage.

    Returns:
        What trains, for the optimizer.

    Raises:
        ValueError: the head is the embedding table, which is not to train.
    """
    if model.config.tie_embeddings:
        raise ValueError("tie_embeddings=True: the head is the embedding; expand the model, which gives it a head")
    return _train(model, [name for name, _ in model.named_parameters() if name.startswith("head.")])


def chain_of(name: str) -> int:
    """The chain, counted from 1, that a parameter belongs to."""
    match = _CHAIN.search(name)
    assert match is not None, name
    return int(match[1])


def train_step(
    model: ChainTransformer, optimizer: torch.optim.Optimizer, tokens_BT: Tensor, scales: Collection[int] | None = None
) -> ScaleLosses:
    """One step on a batch; arguments as in `scale_losses`, whose losses before the step it returns."""
    optimizer.zero_grad(set_to_none=True)
    losses = scale_losses(model, tokens_BT, scales)
    losses.total.backward()
    optimizer.step()
    return losses


def _train(model: ChainTransformer, names: Collection[str]) -> list[Parameter]:
    chosen = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
