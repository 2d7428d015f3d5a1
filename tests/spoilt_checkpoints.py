"""Checkpoints with one thing changed."""

import json
from typing import Any

import safetensors
import safetensors.torch
import torch

from colm.checkpoint import Checkpoint
from tests.tiny import edit_json


def without(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def rewrite(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    """Write other weights below an existing config, as a broken tool does."""
    safetensors.torch.save_file(tensors, checkpoint.weights_path)


def edit_model(checkpoint: Checkpoint, **changes: Any) -> None:
    path = checkpoint.path / "config.json"
    body = json.loads(path.read_text())
    edit_json(path, model=body["model"] | changes)
