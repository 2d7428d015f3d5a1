"""One scale as a checkpoint of its own."""

import pytest
import torch

from colm.checkpoint import Checkpoint
from colm.convert import slice_scale
from colm.errors import CheckpointError
from colm.model import num_parameters
from tests.tiny import in_memory, tiny_checkpoint, tiny_config

SHAPES = {
    "CoLM-Air": {},
    "tied": {"tie_embeddings": True},
    "own head dim": {"explicit_head_dim": 24},
    "CoLM": {"kv_sharing": False, "num_kv_heads": 4, "bias": True, "activation": "gelu"},
}
TOKENS_BT = torch.randint(320, (2, 19), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def source(tmp_path, request) -> Checkpoint:
    return tiny_checkpoint(tmp_path / "source", tiny_config(**request.param), tokenizer=True)


@torch.inference_mode()
@pytest.mark.parametrize("num_chains", [1, 2, 3])
def test_a_slice_answers_as_the_whole_at_that_scale(source, tmp_path, num_chains):
    sliced = slice_scale(source.path, tmp_path / "slice", num_chains)
    assert num_parameters(sliced.config) == num_parameters(source.config, num_chains)
    for scale in range(1, num_chains + 1):
        assert torch.equal(in_memory(sliced, scale)(TOKENS_BT), in_memory(source)(TOKENS_BT, scale))


@torch.inference_mode()
def test_a_slice_of_a_slice_is_the_slice(source, tmp_path):
    slice_scale(source.path, tmp_path / "two", 2)
    once, twice = slice_scale(source.path, tmp_path / "a", 1), slice_scale(tmp_path / "two", tmp_path / "b", 1)
    assert once.config == twice.config
    assert once.weights_path.read_bytes() == twice.weights_path.read_bytes()


def test_text_conventions_dtype_and_tying_are_carried_over(source, tmp_path):
    sliced = slice_scale(source.path, tmp_path / "slice", 2)
    assert (sliced.text, sliced.dtype()) == (source.text, source.dtype())
    assert sliced.tokenizer_json() == source.tokenizer_json()
    assert sliced.config.tie_embeddings is source.config.tie_embeddings


def test_slicing_in_place_replaces_the_source(source):
    with torch.inference_mode():
        before = in_memory(source)(TOKENS_BT, 1)
        assert torch.equal(in_memory(slice_scale(source.path, source.path, 1))(TOKENS_BT), before)


def test_progress_counts_every_tensor(source, tmp_path):
    calls: list[tuple[int, int]] = []
    slice_scale(source.path, tmp_path / "slice", 1, progress=lambda done, total: calls.append((done, total)))
    total = len(slice_scale(source.path, tmp_path / "slice", 1).load().state_dict())
    assert calls == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("num_chains", [0, 4])
def test_a_scale_outside_the_model_is_refused(source, tmp_path, num_chains):
    with pytest.raises(ValueError, match=f"num_chains={num_chains} must be between 1 and 3"):
        slice_scale(source.path, tmp_path / "slice", num_chains)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError):
        slice_scale(tmp_path, tmp_path / "slice", 1)
