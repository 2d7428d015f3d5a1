"""Copies of tensors in one piece of memory."""

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from colm.checkpoint import assign
from colm.huge_pages import side_by_side
from colm.model import ChainTransformer
from tests.tiny import random_tensors, tiny_checkpoint, tiny_config


def test_copies_are_the_tensors_in_the_dtype_one_after_the_other() -> None:
    shapes = {"odd": (3, 5), "scalar": (), "empty": (0, 4), "large": (70, 33)}
    tensors = {name: torch.randn(shape).T if name == "odd" else torch.randn(shape) for name, shape in shapes.items()}
    copies = side_by_side(tensors, torch.bfloat16)
    assert list(copies) == list(tensors)
    end = 0
    for name, copy in copies.items():
        assert copy.is_contiguous()
        assert torch.equal(copy, tensors[name].to(torch.bfloat16))
        if copy.numel():
            assert copy.data_ptr() % 64 == 0
            assert end == 0 or 0 <= copy.data_ptr() - end < 64
            end = copy.data_ptr() + copy.nbytes


def test_the_last_copy_keeps_the_memory_and_can_be_written() -> None:
    kept = side_by_side({"a": torch.ones(1 << 20), "b": torch.full((1 << 20,), 2.0)}, torch.float32)["b"]
    gc.collect()
    assert (kept.add_(1) == 3.0).all()


def test_no_tensors_are_no_copies() -> None:
    assert side_by_side({}, torch.float32) == {}


@pytest.mark.parametrize(("dtype", "is_shared"), [(torch.float32, True), (torch.bfloat16, False)])
def test_weights_are_copied_only_where_their_dtype_changes(dtype: torch.dtype, is_shared: bool) -> None:
    """Defect: copies lay in small pages all over the heap, where few rows read them a fifth slower."""
    tensors = random_tensors(tiny_config(), 1)
    with torch.device("meta"):
        model = ChainTransformer(tiny_config())
    assign(model, tensors, dtype)
    for name, parameter in model.named_parameters():
        assert (parameter.data_ptr() == tensors[name].data_ptr()) == is_shared
        assert torch.equal(parameter, tensors[name].to(dtype))


def test_a_model_in_another_dtype_can_be_saved(tmp_path: Path) -> None:
    """Its tensors share memory without overlap, which the format's writer must see."""
    state = tiny_checkpoint(tmp_path / "tiny").load(dtype=torch.bfloat16).state_dict()
    save_file(state, tmp_path / "saved.safetensors")
    saved = load_file(tmp_path / "saved.safetensors")
    assert {name: tensor.tolist() for name, tensor in saved.items()} == {
        name: tensor.tolist() for name, tensor in state.items()
    }
