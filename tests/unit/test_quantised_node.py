"""A decode node whose weights are quantised answers by the numbers that its blocks stand for."""

from pathlib import Path

import pytest
import torch
from colm_kernels.quantised import Quantisation, quantise

from colm.checkpoint import Checkpoint, save
from tests.nodes import decode, decode_node, prefill_node
from tests.tiny import random_tensors, tiny_checkpoint, tiny_config

CONFIG = tiny_config(hidden_dim=8 * 32)
NOBODY = "127.0.0.1:9"
"""The discard port: nothing listens there."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("quantised") / "tiny", CONFIG)


def in_numbers(path: Path, quantisation: Quantisation) -> Checkpoint:
    """The same model as blocks of `quantisation` give it back, in float32."""

    def number(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() < 2 or ".wk." in name or ".wv." in name or name.startswith("embedding."):
            return tensor
        return quantise(tensor, "int8" if name.startswith("head.") else quantisation).weight().float()

    return save(path, CONFIG, {name: number(name, each) for name, each in random_tensors(CONFIG).items()})


@pytest.mark.parametrize("quantisation", ["int8", "q4"])
async def test_an_answer_is_that_of_the_numbers_and_the_stream_is_any_prefill_nodes(
    checkpoint: Checkpoint, tmp_path: Path, quantisation: Quantisation
) -> None:
    path, prompt = str(checkpoint.path), list(range(3, 23))
    expected = in_numbers(tmp_path / "numbers", quantisation)
    async with (
        prefill_node(path) as prefill,
        decode_node(path, [prefill.address], weights=quantisation) as node,
        decode_node(str(expected.path), [NOBODY]) as whole,
    ):
        for num_chains in (1, 3):
            ours, theirs = [
                await decode(address, prompt, num_chains=num_chains) for address in (node.address, whole.address)
            ]
            assert ours.token_ids == theirs.token_ids
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        long = await decode(node.address, prompt * 4)
        assert long.usage.num_prefill_tokens == 4 * len(prompt) - 1
        assert long.usage.num_kv_streams == 1
