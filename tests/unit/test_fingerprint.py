"""Digest and fingerprint change with all that keys and values depend on, and with nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from colm.checkpoint import Checkpoint, backbone_digest, prefill_tensor_names, save, verify_backbone
from colm.errors import CheckpointError
from colm.kv import KvFormat, fingerprint
from colm.model import parameter_shapes
from colm.model.config import ChainConfig, RopeScaling
from tests.spoilt_checkpoints import edit_model, rewrite
from tests.tiny import flip_last_byte, random_tensors, tiny_checkpoint, tiny_config, without_digest


def changed(directory: Path, config: ChainConfig, names: set[str]) -> Checkpoint:
    """The tiny model with one number of each of these tensors changed to the next float."""
    tensors = random_tensors(config)
    for name in names:
        first = tensors[name].view(-1)[:1]
        first.copy_(torch.nextafter(first, torch.tensor([torch.inf])))
    return save(directory, config, tensors)


def test_the_backbone_digest_ignores_whatever_a_prefill_does_not_read(tmp_path: Path) -> None:
    config = tiny_config()
    others = set(parameter_shapes(config)) - prefill_tensor_names(config)
    assert {"final_norm.chain1", "head.chain1", "layers.0.attention.wq.chain2", "layers.1.ffn.up.chain1"} <= others
    original, other = tiny_checkpoint(tmp_path / "a"), changed(tmp_path / "b", config, others)
    assert backbone_digest(original) == backbone_digest(other)


@pytest.mark.parametrize("name", sorted(prefill_tensor_names(tiny_config())))
def test_the_backbone_digest_sees_the_last_bit_of(tmp_path: Path, name: str) -> None:
    config = tiny_config()
    assert backbone_digest(changed(tmp_path / "b", config, {name})) != backbone_digest(tiny_checkpoint(tmp_path / "a"))


def test_the_digest_stored_is_the_one_that_the_weights_have(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    stored = checkpoint.stored_digest()
    older = without_digest(checkpoint)
    assert older.stored_digest() is None
    assert backbone_digest(older) == stored


def test_a_stored_digest_is_read_without_the_weights_and_verified_with_them(tmp_path: Path) -> None:
    """Bug: every node read all of chain 1 before it started."""
    checkpoint = tiny_checkpoint(tmp_path / "model")
    verify_backbone(checkpoint)
    stored = backbone_digest(checkpoint)
    flip_last_byte(checkpoint, "embedding.chain1")
    assert backbone_digest(checkpoint) == stored
    with pytest.raises(CheckpointError, match="do not match the digest"):
        verify_backbone(checkpoint)


def test_other_weights_below_an_old_config_take_the_digest_with_them(tmp_path: Path) -> None:
    checkpoint, other = tiny_checkpoint(tmp_path / "a"), tiny_checkpoint(tmp_path / "b", seed=9)
    checkpoint.weights_path.write_bytes(other.weights_path.read_bytes())
    assert backbone_digest(checkpoint) == backbone_digest(other)
    rewrite(checkpoint, random_tensors(tiny_config(), seed=7))
    assert backbone_digest(checkpoint) == backbone_digest(tiny_checkpoint(tmp_path / "c", seed=7))


def test_the_fingerprint_changes_where_the_config_is_edited_to_read_fewer_of_the_same_tensors(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    edit_model(checkpoint, activation="gelu")
    edited = Checkpoint.open(checkpoint.path)
    assert edited.stored_digest() == checkpoint.stored_digest()
    assert fingerprint_of(edited) != fingerprint_of(checkpoint)


def test_a_prefill_needs_chain_1_without_head_and_the_last_layer_only_up_to_its_keys_and_values() -> None:
    config = tiny_config()
    names = prefill_tensor_names(config)
    assert all(name.endswith(".chain1") for name in names)
    assert {name for name in names if name.startswith("layers.1.")} == {
        "layers.1.attention_norm.chain1",
        "layers.1.attention.wk.chain1",
        "layers.1.attention.wv.chain1",
    }
    first_layer = {name for name in parameter_shapes(config, 1) if name.startswith("layers.0.")}
    assert names - {name for name in names if name.startswith("layers.1.")} == first_layer | {"embedding.chain1"}


def fingerprint_of(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> str:
    return fingerprint(checkpoint, KvFormat.of(checkpoint.config, dtype))


def test_the_fingerprint_ignores_later_chains_final_norm_and_head(tmp_path: Path) -> None:
    config = tiny_config()
    wider = tiny_config(chains=(4, 2, 2, 4))
    narrow, wide = tiny_checkpoint(tmp_path / "a"), save(tmp_path / "b", wider, grown(config, wider))
    assert fingerprint_of(narrow) == fingerprint_of(wide)


def grown(config: ChainConfig, wider: ChainConfig) -> dict[str, torch.Tensor]:
    """A larger model with chain 1 of the given one; everything else differs."""
    kept = {name: tensor for name, tensor in random_tensors(config).items() if name in prefill_tensor_names(config)}
    return random_tensors(wider, seed=9) | kept


FACTS: dict[str, dict[str, Any]] = {
    "rope theta": {"rope_theta": 20_000.0},
    "rope scaling": {"rope_scaling": RopeScaling(kind="linear", factor=2.0)},
    "norm epsilon": {"norm_eps": 1e-6},
}

YARN = RopeScaling(kind="yarn", factor=4.0)
SCALINGS: dict[str, dict[str, Any]] = {
    "factor": {"factor": 8.0},
    "original context": {"original_max_context": 64},
    "fast beta": {"beta_fast": 16.0},
    "slow beta": {"beta_slow": 2.0},
    "truncation": {"truncate": False},
    "attention factor": {"attention_factor": 1.5},
}


@pytest.mark.parametrize("change", FACTS.values(), ids=FACTS.keys())
def test_the_fingerprint_changes_with(tmp_path: Path, change: dict[str, Any]) -> None:
    original, other = tiny_checkpoint(tmp_path / "a"), tiny_checkpoint(tmp_path / "b", tiny_config(**change))
    assert fingerprint_of(original) != fingerprint_of(other)


@pytest.mark.parametrize("change", SCALINGS.values(), ids=SCALINGS.keys())
def test_the_fingerprint_changes_with_all_that_yarn_keys_depend_on(tmp_path: Path, change: dict[str, Any]) -> None:
    original = tiny_checkpoint(tmp_path / "a", tiny_config(rope_scaling=YARN))
    other = tiny_checkpoint(tmp_path / "b", tiny_config(rope_scaling=replace(YARN, **change)))
    assert fingerprint_of(original) != fingerprint_of(other)


def test_the_fingerprint_changes_with_the_last_bit_of_a_chain_1_weight(tmp_path: Path) -> None:
    original = tiny_checkpoint(tmp_path / "a")
    other = changed(tmp_path / "b", original.config, {"layers.0.ffn.down.chain1"})
    assert fingerprint_of(original) != fingerprint_of(other)


def test_the_fingerprint_changes_with_the_dtype(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    assert fingerprint_of(checkpoint) != fingerprint_of(checkpoint, torch.bfloat16)
