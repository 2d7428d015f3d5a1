"""Chain 1 as a Hugging Face LLaMA: transformers loads it and computes the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from colm_kernels import tolerance

from colm.checkpoint import Checkpoint, save
from colm.convert import expand, from_huggingface, to_huggingface
from colm.errors import CheckpointError, UnsupportedModel
from colm.model.config import RopeScaling
from colm.text.tokenizer import Tokenizer
from tests.tiny import random_tensors, tiny_checkpoint, tiny_config, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS: dict[str, dict[str, Any]] = {
    "CoLM-Air": {},
    "one chain": {"chains": (6,)},
    "tied": {"tie_embeddings": True},
    "biases": {"bias": True},
    "own head dim": {"explicit_head_dim": 32},
    "CoLM": {"kv_sharing": False, "num_kv_heads": 4},
    "linear rope": {"rope_theta": 5000.0, "rope_scaling": RopeScaling(kind="linear", factor=4.0)},
    "llama3 rope": {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_max_context=64)},
    "yarn": {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_max_context=64, beta_fast=8.0)},
    "yarn with a factor of its own": {
        "rope_scaling": RopeScaling(
            kind="yarn", factor=4.0, original_max_context=128, beta_slow=2.0, truncate=False, attention_factor=1.25
        )
    },
}


def theirs(directory: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


def assert_same_logits(checkpoint: Checkpoint, directory: Path, num_tokens: int = 131) -> None:
    """Compare logits on a text longer than the rope's original context, so that a wrong scaling shows."""
    vocab_size = checkpoint.config.vocab_size
    tokens_BT = torch.randint(vocab_size, (2, num_tokens), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        ours = checkpoint.load(1)(tokens_BT)
        exact = theirs(directory, torch.float64)(tokens_BT).logits
    config = checkpoint.config
    tolerance.layers(exact, checkpoint.dtype(), num_layers=config.num_layers, width=config.dim).check(ours)


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS.keys())
def test_transformers_computes_the_same_logits(tmp_path, shape):
    checkpoint = tiny_checkpoint(tmp_path / "colm", tiny_config(**shape))
    assert_same_logits(checkpoint, to_huggingface(checkpoint.path, tmp_path / "hf"))


@pytest.mark.filterwarnings("ignore:.*serves token ids only")
@pytest.mark.parametrize("shape", [shape for shape in MODELS.values() if "rope_scaling" in shape])
def test_import_gives_back_the_rope_scaling(tmp_path, shape):
    checkpoint = tiny_checkpoint(tmp_path / "colm", tiny_config(**shape))
    again = from_huggingface(to_huggingface(checkpoint.path, tmp_path / "hf"), tmp_path / "again")
    assert again.config.rope_scaling == checkpoint.config.rope_scaling


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("gqa", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_head_dim_and_gqa_ratio_in_both_dtypes(tmp_path, dtype, gqa, head_dim):
    config = tiny_config(
        chains=(gqa,), num_kv_heads=1, dim=head_dim * gqa, hidden_dim=96 * gqa, num_layers=1, bias=gqa == 2
    )
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(config).items()}
    checkpoint = save(tmp_path / "colm", config, tensors)
    assert_same_logits(checkpoint, to_huggingface(checkpoint.path, tmp_path / "hf"), num_tokens=17)


def test_biases_of_a_hugging_face_model_are_imported(tmp_path):
    tiny_llama(tmp_path / "hf", attention_bias=True, mlp_bias=True)
    with pytest.warns(UserWarning, match="serves token ids only"):
        checkpoint = from_huggingface(tmp_path / "hf", tmp_path / "colm")
    assert checkpoint.config.bias
    assert_same_logits(checkpoint, tmp_path / "hf", num_tokens=37)


@pytest.mark.filterwarnings("ignore:.*serves token ids only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_import_expansion_and_export_give_back_the_weights(tmp_path, dtype):
    from safetensors.torch import load_file

    tiny_llama(tmp_path / "hf", dtype=dtype, tie_word_embeddings=False)
    from_huggingface(tmp_path / "hf", tmp_path / "colm")
    expand(tmp_path / "colm", tmp_path / "larger", (4, 2))
    to_huggingface(tmp_path / "larger", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_text_is_read_the_same_way(tmp_path):
    from transformers import AutoTokenizer

    checkpoint = tiny_checkpoint(tmp_path / "colm", tokenizer=True)
    directory = to_huggingface(checkpoint.path, tmp_path / "hf")
    ours, tokenizer = Tokenizer.load(checkpoint), AutoTokenizer.from_pretrained(directory)
    assert ours is not None
    messages = [{"role": "user", "content": "the and the"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ours.encode_prompt(document="", prompt="the and the", chat=True).tolist() == tokenizer.encode(
        expected, add_special_tokens=False
    )
    assert tokenizer.eos_token_id == 2
    assert theirs(directory, torch.float32).generation_config.eos_token_id in (2, [2])
    assert from_huggingface(directory, tmp_path / "again").text == checkpoint.text


def test_gelu_has_no_place_in_a_llama(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "colm", tiny_config(activation="gelu"))
    with pytest.raises(UnsupportedModel, match="activation='gelu'"):
        to_huggingface(checkpoint.path, tmp_path / "hf")


def test_what_is_in_the_way_is_refused_and_untouched(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "colm")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/notes").write_text("mine")
    with pytest.raises(CheckpointError, match="hf exists"):
        to_huggingface(checkpoint.path, tmp_path / "hf")
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["notes"]
