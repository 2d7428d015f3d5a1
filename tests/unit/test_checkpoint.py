"""What is saved is what is loaded, and weights that are not finite are neither."""

import os
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from colm.checkpoint import Checkpoint, TextConfig, load, prefill_tensor_names, save
from colm.errors import CheckpointError
from colm.model import parameter_shapes
from colm.model.config import RopeScaling
from tests.nodes import decode_node, prefill_node
from tests.spoilt_checkpoints import rewrite
from tests.tiny import random_tensors, tiny_checkpoint, tiny_config, tiny_tokenizer


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    config = tiny_config()
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(config).items()}
    loaded = save(tmp_path / "model", config, tensors).tensors(tensors)
    assert all(torch.equal(bits(loaded[name]), bits(tensor)) for name, tensor in tensors.items())


def test_config_text_and_tokenizer_come_back(tmp_path: Path) -> None:
    config = tiny_config(rope_scaling=RopeScaling(kind="linear", factor=2.0), tie_embeddings=True)
    text = TextConfig(bos_token_id=1, eos_token_ids=(2, 7), add_bos=True, chat_template="{{ x }}")
    tokenizer_json = tiny_tokenizer().to_str().encode()
    save(tmp_path / "model", config, random_tensors(config), text=text, tokenizer_json=tokenizer_json)
    opened = Checkpoint.open(tmp_path / "model")
    assert (opened.config, opened.text) == (config, text)
    assert opened.tokenizer_path is not None
    assert opened.tokenizer_path.read_bytes() == tokenizer_json


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path: Path) -> None:
    """Bug: safetensors writes for the owner alone, so that a node of another user could not open its checkpoint."""
    before = os.umask(0o027)
    try:
        checkpoint = save(tmp_path / "model", tiny_config(), random_tensors(tiny_config()))
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in checkpoint.path.iterdir()} == {0o640}


def test_without_a_tokenizer_there_is_none(tmp_path: Path) -> None:
    assert tiny_checkpoint(tmp_path / "model").tokenizer_path is None


@pytest.mark.parametrize("num_chains", [1, 2, 3])
def test_load_builds_the_asked_chains_and_no_other(tmp_path: Path, num_chains: int) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    model = load(checkpoint.path, num_chains=num_chains)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert shapes == parameter_shapes(checkpoint.config, num_chains)


def test_loaded_weights_are_frozen_and_none_is_left_without_memory(tmp_path: Path) -> None:
    model = load(tiny_checkpoint(tmp_path / "model").path)
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())


def test_load_casts_to_the_asked_dtype(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    assert {parameter.dtype for parameter in checkpoint.load(dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert checkpoint.dtype() == torch.float32


def test_saving_replaces_an_older_checkpoint(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model", seed=1, tokenizer=True)
    newer = tiny_checkpoint(tmp_path / "model", seed=2)
    name = "layers.0.attention.wk.chain1"
    assert torch.equal(newer.tensors([name])[name], random_tensors(tiny_config(), seed=2)[name])
    assert newer.tokenizer_path is None
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert tiny_checkpoint(tmp_path / "model").config == tiny_config()


NON_FINITE = pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])


def spoilt(tensors: dict[str, torch.Tensor], name: str, value: float) -> dict[str, torch.Tensor]:
    """The same tensors, one number of one of them replaced."""
    tensors[name].view(-1)[-1] = value
    return tensors


@NON_FINITE
@pytest.mark.parametrize("name", ["embedding.chain1", "head.chain3"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, name: str, value: float) -> None:
    """Bug: they were, and answers were silence."""
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' holds NaN or infinities"):
        save(tmp_path / "model", tiny_config(), spoilt(random_tensors(tiny_config()), name, value))
    assert list(tmp_path.iterdir()) == []


@NON_FINITE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_another_tool_are_looked_at(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    checkpoint, name = tiny_checkpoint(tmp_path / "model"), "layers.0.ffn.up.chain2"
    tensors = spoilt(random_tensors(checkpoint.config), name, value)
    rewrite(checkpoint, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor '{name}' holds NaN or infinities"):
        checkpoint.require_finite(parameter_shapes(checkpoint.config))
    checkpoint.require_finite(prefill_tensor_names(checkpoint.config))


def test_what_save_has_looked_at_is_not_read_again_but_what_an_older_build_wrote_is(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    stored = checkpoint.stored_digest()
    assert stored is not None
    with safetensors.safe_open(checkpoint.weights_path, "pt") as file:
        (key,) = file.metadata()
    data = checkpoint.weights_path.read_bytes()
    # The last of the file's numbers becomes NaN.
    checkpoint.weights_path.write_bytes(data[:-4] + struct.pack("<f", float("nan")))
    checkpoint.require_finite(parameter_shapes(checkpoint.config))
    safetensors.torch.save_file(
        spoilt(random_tensors(checkpoint.config), "head.chain1", float("nan")),
        checkpoint.weights_path,
        {"backbone_sha256": stored},
    )
    assert key != "backbone_sha256"
    assert checkpoint.stored_digest() == stored
    with pytest.raises(CheckpointError, match=r"'head\.chain1' holds NaN"):
        checkpoint.require_finite(parameter_shapes(checkpoint.config))


async def test_no_node_starts_with_weights_that_are_not_finite(tmp_path: Path) -> None:
    """Bug: a prefill node sent NaN keys, and the answer was an error without a cause."""
    checkpoint, name = tiny_checkpoint(tmp_path / "model"), "layers.1.attention.wk.chain1"
    rewrite(checkpoint, spoilt(random_tensors(checkpoint.config), name, float("nan")))
    for node in (prefill_node(str(checkpoint.path)), decode_node(str(checkpoint.path), ["127.0.0.1:1"])):
        with pytest.raises(CheckpointError, match=f"tensor '{name}' holds NaN"):
            await node.__aenter__()
