"""Tiny random models, checkpoints, tokenizers and Hugging Face directories, all made offline.

Shapes: as in `colm.model`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from colm.checkpoint import Checkpoint, TextConfig, assign, prefill_tensor_names, save
from colm.model import ChainTransformer, parameter_shapes
from colm.model.config import ChainConfig

HEAD_DIM = 16
HIDDEN_PER_HEAD = 24
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (
    ("t", "h"),
    ("th", "e"),
    ("Ġ", "the"),
    ("i", "n"),
    ("a", "n"),
    ("an", "d"),
    ("Ġ", "and"),
    ("e", "r"),
    ("Ġ", "a"),
    ("Ġ", "Ġ"),
    ("Ċ", "Ċ"),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_config(**overrides: Any) -> ChainConfig:
    """Three chains over two kv heads; widths follow from the number of heads unless they are given."""
    chains = tuple(overrides.pop("chains", (4, 2, 2)))
    num_heads = sum(chains)
    values: dict[str, Any] = {
        "dim": HEAD_DIM * num_heads,
        "hidden_dim": HIDDEN_PER_HEAD * num_heads,
        "num_layers": 2,
        "num_heads": num_heads,
        "num_kv_heads": 2,
        "vocab_size": 320,
        "max_context": 512,
    }
    return ChainConfig(chains=chains, **(values | overrides))


def random_tensors(config: ChainConfig, seed: int = 0) -> dict[str, Tensor]:
    """float32 weights of every tensor, scaled so that activations and logits are of the order of one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if "norm." in name:
            tensors[name] = 1 + 0.1 * noise
        elif name.endswith("_bias"):
            tensors[name] = 0.1 * noise
        elif name.startswith("embedding."):
            tensors[name] = noise
        else:
            tensors[name] = noise / shape[1] ** 0.5
    return tensors


def tiny_model(config: ChainConfig | None = None, seed: int = 0, dtype: torch.dtype | None = None) -> ChainTransformer:
    """The model of `random_tensors`."""
    config = config or tiny_config()
    with torch.device("meta"):
        model = ChainTransformer(config)
    assign(model, random_tensors(config, seed), dtype)
    return model


def tiny_checkpoint(
    path: Path, config: ChainConfig | None = None, seed: int = 0, tokenizer: bool = False
) -> Checkpoint:
    """Save the model of `random_tensors`; with a tokenizer, its chat template and `<|im_end|>` as eos too."""
    config = config or tiny_config()
    text = TextConfig(bos_token_id=1, eos_token_ids=(2,), chat_template=CHAT_TEMPLATE) if tokenizer else None
    tokenizer_json = tiny_tokenizer().to_str().encode() if tokenizer else None
    return save(path, config, random_tensors(config, seed), text=text, tokenizer_json=tokenizer_json)


def fine_tuned(path: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Save another model of the same chain 1: what no key or value depends on is of another seed."""
    config, kept = checkpoint.config, prefill_tensor_names(checkpoint.config)
    before, after = checkpoint.tensors(parameter_shapes(config)), random_tensors(config, seed=7)
    return save(path, config, {name: (before if name in kept else after)[name] for name in before})


def flip_last_byte(checkpoint: Checkpoint, name: str) -> None:
    """Change the last byte of a stored tensor in place, as a bad disk does."""
    data = bytearray(checkpoint.weights_path.read_bytes())
    header_bytes = int.from_bytes(data[:8], "little")
    data[8 + header_bytes + json.loads(data[8 : 8 + header_bytes])[name]["data_offsets"][1] - 1] ^= 1
    checkpoint.weights_path.write_bytes(data)


def without_digest(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint without a digest, as older builds wrote it."""
    tensors = checkpoint.tensors(parameter_shapes(checkpoint.config))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, checkpoint.weights_path)
    return Checkpoint.open(checkpoint.path)


def in_memory(checkpoint: Checkpoint, num_chains: int | None = None) -> ChainTransformer:
    """The model with its weights copied into memory of its own, at the allocator's alignment.

    In a file weights may lie at any multiple of their own size, and at another alignment PyTorch's products may sum in
    another order. Bits of two files' models can be compared only after the copy.
    """
    model = checkpoint.load(num_chains)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE of 270 tokens: ids 0-2 special, then the 256 bytes, then a few English merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL_TOKENS, *alphabet, *(left + right for left, right in MERGES)]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def tiny_llama(path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """Save a random transformers LlamaForCausalLM as a Hugging Face directory and return it.

    Args:
        path: directory to write.
        seed: of the weights.
        dtype: in which it is saved and returned.
        overrides: fields of transformers' LlamaConfig.
    """
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
    )  # slow to import, and most users of this file do not need it

    values: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "attn_implementation": "eager",
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(values | overrides))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else noise / parameter.shape[-1] ** 0.5)
    model = model.to(dtype)
    model.save_pretrained(path)
    return model


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level fields of a JSON file; None removes one."""
    body = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in body.items() if value is not None}))
