"""A model whose weights lie in panels: which of them do, and what it costs to lay them out."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from colm_kernels.panels import Panels
from torch import Tensor

from colm.checkpoint import Checkpoint
from colm.model import ChainTransformer
from colm.model.weights import lay_out_in_panels
from tests.tiny import tiny_checkpoint, tiny_config

MODELS: dict[str, dict[str, Any]] = {
    "head of its own": {},
    "tied": {"tie_embeddings": True},
    "biases": {"bias": True},
    "gelu": {"activation": "gelu"},
    "odd widths": {"dim": 8 * 20, "hidden_dim": 8 * 27, "vocab_size": 319},
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Checkpoint:
    return tiny_checkpoint(tmp_path / "tiny", tiny_config(**request.param))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_a_step_multiplies_by_lies_in_panels_and_all_else_as_before(
    checkpoint: Checkpoint, dtype: torch.dtype
) -> None:
    model, expected = checkpoint.load_in_panels(dtype), dict(checkpoint.load(dtype=dtype).named_parameters())
    panels = {
        f"{module_name}.{name}": weight
        for module_name, module in model.multiplied.items()
        for name, weight in zip(module.names, module.weights(len(module.names)), strict=True)
    }
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and (checkpoint.config.tie_embeddings or not name.startswith("embedding"))
        assert (name in panels) == is_matrix
        if is_matrix:
            weight = panels[name]
            assert isinstance(weight, Panels)
            assert torch.equal(weight.rows(), expected[name])
            assert parameter.is_meta, "the rows take memory as well"
        else:
            assert torch.equal(parameter, expected[name])


def test_embeddings_of_a_tied_table_are_looked_up_in_its_panels(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tied", tiny_config(tie_embeddings=True, vocab_size=319))
    tokens = torch.tensor([318, 0, 31, 32, 31])
    by_rows, in_panels = checkpoint.load(dtype=torch.float32), checkpoint.load_in_panels(torch.float32)
    for num_chains in (1, 2, 3):
        assert torch.equal(in_panels.embedding.embed(tokens, num_chains), by_rows.embedding.embed(tokens, num_chains))


def test_a_tensor_of_the_file_is_let_go_of_before_the_next_is_read(tmp_path: Path) -> None:
    """Else a node would need its weights' memory twice while it loads them."""
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    with torch.device("meta"):
        model = ChainTransformer(checkpoint.config)
    stored, given = checkpoint.load().state_dict(), list[weakref.ref[Tensor]]()

    def weight_of(name: str) -> Tensor:
        gc.collect()
        assert all(earlier() is None for earlier in given), f"something is held while {name} is read"
        weight = stored[name].clone()
        given.append(weakref.ref(weight))
        return weight

    names = lay_out_in_panels(model.multiplied, weight_of, torch.float32)
    assert len(names) == len(given) > checkpoint.config.num_layers
