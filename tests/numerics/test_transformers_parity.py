"""Our model against transformers' LLaMA on the same weights; a real model's import against its loader."""

from pathlib import Path
from typing import Any

import pytest
import torch
from colm_kernels import tolerance

from colm.checkpoint import Checkpoint
from colm.convert import from_huggingface
from colm.text.tokenizer import Tokenizer
from tests.tiny import edit_json, tiny_llama

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*serves token ids only")]

# (rope fields of config.json in the spelling before transformers 5, the same in the present one)
ROPES = {
    "default": (None, {"rope_type": "default"}),
    "linear": ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "llama3": ({"rope_type": "llama3", **LLAMA3}, {"rope_type": "llama3", **LLAMA3}),
    **{
        name: ({"type": "yarn", **values}, {"rope_type": "yarn", **values})
        for name, values in {
            "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
            "yarn of a model whose context is the original": {"factor": 4.0},
            "yarn with betas": {
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 8,
                "beta_slow": 2,
                "truncate": False,
            },
            "yarn with an attention factor": {
                "factor": 2.5,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.3,
            },
            "yarn with two mscales": {
                "factor": 40.0,
                "original_max_position_embeddings": 64,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
            },
            "yarn with one mscale": {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7},
        }.items()
    },
}


def assert_same_logits(model: Any, checkpoint: Checkpoint, num_tokens: int) -> None:
    vocab_size = checkpoint.config.vocab_size
    tokens_BT = torch.randint(vocab_size, (2, num_tokens), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        ours = checkpoint.load()(tokens_BT)
        exact = model.double()(tokens_BT).logits
    config = checkpoint.config
    tolerance.layers(exact, checkpoint.dtype(), num_layers=config.num_layers, width=config.dim).check(ours)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("ratio", [1, 2, 3, 8])
def test_logits_equal_transformers_for_every_gqa_ratio(tmp_path, ratio, tied):
    num_kv_heads = 1 if ratio == 8 else 2
    num_heads = ratio * num_kv_heads
    model = tiny_llama(
        tmp_path / "hf",
        hidden_size=16 * num_heads,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        tie_word_embeddings=tied,
    )
    checkpoint = from_huggingface(tmp_path / "hf", tmp_path / "colm")
    assert checkpoint.config.tie_embeddings is tied
    assert_same_logits(model, checkpoint, num_tokens=37)


@pytest.mark.parametrize("head_dim", [16, 64, 80])
def test_logits_equal_transformers_for_every_head_dim(tmp_path, head_dim):
    model = tiny_llama(tmp_path / "hf", hidden_size=4 * head_dim)
    assert_same_logits(model, from_huggingface(tmp_path / "hf", tmp_path / "colm"), num_tokens=37)


def test_logits_equal_transformers_where_head_dim_is_explicit(tmp_path):
    model = tiny_llama(tmp_path / "hf", head_dim=32)
    checkpoint = from_huggingface(tmp_path / "hf", tmp_path / "colm")
    assert checkpoint.config.explicit_head_dim == 32
    assert_same_logits(model, checkpoint, num_tokens=37)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ROPES)
def test_logits_equal_transformers_for_every_rope_in_both_spellings(tmp_path, kind, spelling):
    before, now = ROPES[kind]
    model = tiny_llama(tmp_path / "hf", rope_parameters={"rope_theta": 5000.0, **now})
    if spelling == "rope_scaling":
        edit_json(tmp_path / "hf/config.json", rope_parameters=None, rope_scaling=before, rope_theta=5000.0)
    checkpoint = from_huggingface(tmp_path / "hf", tmp_path / "colm")
    assert checkpoint.config.rope_theta == 5000.0
    assert (checkpoint.config.rope_scaling is None) == (kind == "default")
    # Longer than the original context, so that a wrong scaling shows.
    assert_same_logits(model, checkpoint, num_tokens=131)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Any:
    """transformers' own reading of the GGUF file, float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def test_smollm2_answers_greedily_like_transformers(smollm2, smollm2_checkpoint):
    tokenizer = Tokenizer.load(smollm2_checkpoint)
    assert tokenizer is not None
    prompt = tokenizer.encode_prompt(document="", prompt="What is the capital of France?", chat=True).tolist()
    ours, ids = smollm2_checkpoint.load(), list(prompt)
    with torch.inference_mode():
        while ids[-1] not in tokenizer.eos_token_ids or len(ids) == len(prompt):
            ids.append(int(ours(torch.tensor([ids]))[0, -1].argmax()))
            assert len(ids) < len(prompt) + 20
        # Each answer token is transformers' first choice after those before it: its greedy answer.
        choices = smollm2(torch.tensor([ids])).logits[0].argmax(dim=-1).tolist()
    assert ids[len(prompt) :] == choices[len(prompt) - 1 : -1]
    assert tokenizer.decode(ids[len(prompt) :]) == "The capital of France is Paris."


def test_smollm2_logits_equal_transformers(smollm2, smollm2_checkpoint):
    tokens_BT = torch.randint(49152, (1, 33), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        ours = smollm2_checkpoint.load()(tokens_BT)
        # Module.double, because transformers refuses to cast back a model that was quantised on disk.
        exact = torch.nn.Module.double(smollm2)(tokens_BT).logits
        torch.nn.Module.float(smollm2)
    config = smollm2_checkpoint.config
    tolerance.layers(exact, torch.float32, num_layers=config.num_layers, width=config.dim).check(ours)
