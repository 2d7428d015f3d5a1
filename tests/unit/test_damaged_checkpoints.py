"""Saves that fail leave what was there, and damaged checkpoints are refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from colm.checkpoint import Checkpoint, save
from colm.errors import CheckpointError
from tests.spoilt_checkpoints import edit_model, rewrite, without
from tests.tiny import edit_json, random_tensors, tiny_checkpoint, tiny_config


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


BAD_SAVES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "missing": (lambda tensors: without(tensors, "layers.1.ffn.up.chain2"), "layers.1.ffn.up.chain2"),
    "missing of the backbone": (lambda tensors: without(tensors, "embedding.chain1"), "embedding.chain1"),
    "misshapen": (
        lambda tensors: tensors | {"layers.0.attention.wk.chain1": torch.zeros(2, 3)},
        "layers.0.attention.wk.chain1",
    ),
    "stranger": (lambda tensors: tensors | {"layers.0.attention.wk.chain2": torch.zeros(2)}, "wk.chain2"),
}


@pytest.mark.parametrize(("spoil", "name"), BAD_SAVES.values(), ids=BAD_SAVES.keys())
def test_a_failing_save_names_the_tensor_and_leaves_the_old_checkpoint(
    tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], name: str
) -> None:
    old = tiny_checkpoint(tmp_path / "model", seed=1)
    before = contents(old.path)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        save(old.path, tiny_config(), spoil(random_tensors(tiny_config(), seed=2)))
    assert contents(old.path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failing_first_save_leaves_nothing(tmp_path: Path) -> None:
    tensors = without(random_tensors(tiny_config()), "final_norm.chain1")
    with pytest.raises(CheckpointError):
        save(tmp_path / "model", tiny_config(), tensors)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_no_checkpoint_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="thesis exists and is not a checkpoint"):
        tiny_checkpoint(tmp_path / "thesis")
    assert contents(tmp_path / "thesis") == {"chapter1.tex": b"years of work"}


def test_a_directory_with_a_config_of_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    """Bug: any directory with a config.json, a Hugging Face model say, was taken for a checkpoint and deleted."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "llama" / "pytorch_model.bin").write_bytes(b"weights")
    with pytest.raises(CheckpointError, match="llama exists and is not a checkpoint"):
        tiny_checkpoint(tmp_path / "llama")
    assert set(contents(tmp_path / "llama")) == {"config.json", "pytorch_model.bin"}


def test_a_file_in_the_way_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("notes")
    with pytest.raises(CheckpointError, match="model exists and is not a checkpoint"):
        tiny_checkpoint(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "notes"


def truncate(checkpoint: Checkpoint) -> None:
    with checkpoint.weights_path.open("r+b") as file:
        file.truncate(checkpoint.weights_path.stat().st_size // 2)


DAMAGES: dict[str, tuple[Callable[[Checkpoint], object], str]] = {
    "truncated weights": (truncate, r"model\.safetensors is truncated"),
    "not safetensors": (lambda ck: ck.weights_path.write_bytes(b"{}"), r"model\.safetensors is truncated or not"),
    "no weights": (lambda ck: ck.weights_path.unlink(), r"model\.safetensors is missing"),
    "missing tensor": (
        lambda ck: rewrite(ck, without(random_tensors(ck.config), "layers.1.ffn.down.chain3")),
        r"model\.safetensors: tensor 'layers\.1\.ffn\.down\.chain3' is missing",
    ),
    "misshapen tensor": (
        lambda ck: rewrite(ck, random_tensors(ck.config) | {"head.chain2": torch.zeros(320, 5)}),
        r"model\.safetensors: tensor 'head\.chain2' has shape \(320, 5\), expected \(320, 32\)",
    ),
    "no config": (lambda ck: (ck.path / "config.json").unlink(), r"config\.json is missing; .*colm import"),
    "bad JSON": (lambda ck: (ck.path / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    "not text": (lambda ck: (ck.path / "config.json").write_bytes(b"\xff"), r"config\.json is not UTF-8"),
    "not an object": (lambda ck: (ck.path / "config.json").write_text("[]"), r"config\.json holds list, not an object"),
    "another format": (
        lambda ck: edit_json(ck.path / "config.json", format="gguf"),
        r"config\.json is not a colm-checkpoint; run `colm import",
    ),
    "another version": (
        lambda ck: edit_json(ck.path / "config.json", format_version=99),
        r"config\.json: format_version=99, this build reads 1",
    ),
    "no model section": (
        lambda ck: edit_json(ck.path / "config.json", model=None),
        r"config\.json: model must be an object",
    ),
    "impossible model": (lambda ck: edit_model(ck, num_heads=7), r"config\.json: chains=.*num_heads=7"),
    "unknown model field": (lambda ck: edit_model(ck, window=8), r"config\.json: unknown model fields \['window'\]"),
    "unknown text field": (
        lambda ck: edit_json(ck.path / "config.json", text={"language": "en"}),
        r"config\.json: .*'language'",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_refused_by_name(
    tmp_path: Path, damage: Callable[[Checkpoint], object], message: str
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(checkpoint.path)
