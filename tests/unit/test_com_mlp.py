"""Chains beyond transformers: the MLP of the paper's Table 14, built from the same layers.

An ordinary input layer 3072-768, chain layers 768-1024-512-256 without biases, an ordinary output layer 256-10.
"""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from colm.model.linear import ChainLinear

NUM_PIXELS, NUM_CLASSES = 3072, 10
WIDTHS = (768, 1024, 512, 256)
# Table 14: the parameters of each chain setting, and of the dense model.
TABLE_14 = {(4, 4, 4, 4): 3_263_754, (8, 8): 3_443_978, (4, 12): 3_534_090, (4, 4, 8): 3_353_866}
DENSE_PARAMETERS = 3_806_218


class ComMlp(nn.Module):
    """A classifier whose first chains are a classifier of their own."""

    def __init__(self, chains: Sequence[int]) -> None:
        super().__init__()
        split = [[width * chain // sum(chains) for chain in chains] for width in WIDTHS]
        self.input = nn.Linear(NUM_PIXELS, WIDTHS[0])
        self.layers = nn.ModuleList(ChainLinear(a, b) for a, b in pairwise(split))
        self.output = nn.Linear(WIDTHS[-1], NUM_CLASSES)
        self.first_widths = split[0]
        for layer in self.layers:
            for parameter in layer.parameters():
                nn.init.kaiming_uniform_(parameter, nonlinearity="relu")

    def features(self, pixels_RI: Tensor, num_chains: int) -> list[Tensor]:
        xs = list(F.relu(self.input(pixels_RI)).split(self.first_widths, dim=1)[:num_chains])
        for layer in self.layers:
            xs = [F.relu(y) for y in layer.by_chain(xs)]
        return xs

    def forward(self, pixels_RI: Tensor, num_chains: int) -> Tensor:
        """Class scores at one scale, from the output layer's columns of its chains."""
        features = torch.cat(self.features(pixels_RI, num_chains), dim=1)
        return F.linear(features, self.output.weight[:, : features.shape[1]], self.output.bias)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def dense_mlp() -> nn.Sequential:
    widths = (NUM_PIXELS, *WIDTHS, NUM_CLASSES)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


@pytest.mark.parametrize(("chains", "expected"), TABLE_14.items(), ids=str)
def test_parameters_are_those_of_table_14(chains, expected):
    assert num_parameters(ComMlp(chains)) == expected


def test_the_dense_model_has_the_parameters_of_table_14():
    assert num_parameters(dense_mlp()) == DENSE_PARAMETERS


@torch.inference_mode()
@pytest.mark.parametrize("chains", TABLE_14, ids=str)
def test_a_scale_does_not_depend_on_later_chains(chains):
    torch.manual_seed(0)
    model, pixels_RI = ComMlp(chains), torch.randn(3, NUM_PIXELS)
    before = model(pixels_RI, 1)
    for layer in model.layers:
        for name, parameter in layer.named_parameters():
            if name != "chain1":
                parameter.fill_(torch.nan)
    assert torch.equal(model(pixels_RI, 1), before)
    assert torch.equal(model.features(pixels_RI, len(chains))[0], model.features(pixels_RI, 1)[0])


def test_every_scale_learns_at_once():
    """Ten noisy patterns, one a class."""
    torch.manual_seed(0)
    model, patterns = ComMlp((4, 4, 8)), torch.randn(NUM_CLASSES, NUM_PIXELS)
    labels_R = torch.arange(NUM_CLASSES).repeat(3)
    pixels_RI = patterns[labels_R] + 0.1 * torch.randn(len(labels_R), NUM_PIXELS)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(15):
        optimizer.zero_grad()
        sum(F.cross_entropy(model(pixels_RI, scale), labels_R) for scale in (1, 2, 3)).backward()
        optimizer.step()
    with torch.inference_mode():
        for scale in (1, 2, 3):
            assert torch.equal(model(pixels_RI, scale).argmax(dim=1), labels_R)
