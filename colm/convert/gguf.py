"""Import of a LLaMA in a GGUF file."""

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from colm.checkpoint import Checkpoint, save
from colm.convert.gguf_file import GgufFile
from colm.convert.gguf_tokenizer import text_from_gguf
from colm.convert.llama import (
    Progress,
    carry_over,
    chain_config,
    check_dtype,
    check_num_layers,
    refuse_unknown,
    source_names,
)
from colm.convert.stretch import Stretch
from colm.errors import CheckpointError, UnsupportedModel
from colm.finite import is_finite
from colm.model.config import ChainConfig, RopeScaling, yarn_attention_factor
from colm.model.rope import inverse_frequencies

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
LAYOUT = {
    "embedding.chain1": EMBEDDING,
    "layers.{}.attention_norm.chain1": "blk.{}.attn_norm.weight",
    "layers.{}.attention.wq.chain1": "blk.{}.attn_q.weight",
    "layers.{}.attention.wk.chain1": "blk.{}.attn_k.weight",
    "layers.{}.attention.wv.chain1": "blk.{}.attn_v.weight",
    "layers.{}.attention.wo.chain1": "blk.{}.attn_output.weight",
    "layers.{}.ffn_norm.chain1": "blk.{}.ffn_norm.weight",
    "layers.{}.ffn.gate.chain1": "blk.{}.ffn_gate.weight",
    "layers.{}.ffn.up.chain1": "blk.{}.ffn_up.weight",
    "layers.{}.ffn.down.chain1": "blk.{}.ffn_down.weight",
    "final_norm.chain1": "output_norm.weight",
    "head.chain1": HEAD,
}

LLAMA3_ORIGINAL_CONTEXTS = tuple(1024 << power for power in range(8))
"""Contexts of pre-training that llama3 scaling is recognised for, 1K to 128K; published models have 8K."""
ROPE_FACTOR_TOLERANCE = 1e-5
"""Largest relative difference of two equal frequencies. A converter's fp32 arithmetic stays below it; the nearest
other candidate is far above."""


def from_gguf(
    src_file: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    stretch: Stretch | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Turn a GGUF file of LLaMA architecture into a one-chain checkpoint.

    Args:
        src_file: tensors of type F32, F16, BF16, Q8_0, Q4_0 or Q4_1; tokenizer and chat template come from
            its metadata.
        dest: directory to write; an older checkpoint there is replaced.
        dtype: dtype of all weights; None keeps a float file's and makes a quantised one bfloat16, gains
            included.
        stretch: rope scaling for longer contexts than the file's; None keeps the file's rope.
        progress: told after each tensor.

    Returns:
        The saved checkpoint.

    Raises:
        UnsupportedModel: a property of the model cannot be carried over.
        CheckpointError: the file is broken, or a tensor or a metadata key is missing.
    """
    check_dtype(dtype)
    file = GgufFile(Path(src_file))
    config = _config(file)
    if stretch is not None:
        config = stretch.of(file.path, config)
    check_num_layers(file, config)
    refuse_unknown(file, {*source_names(config, LAYOUT).values(), ROPE_FACTORS})

    def convert(name: str, tensor: Tensor) -> Tensor:
        if ".wq." in name:
            return _half_split_rows(tensor, config.num_heads)
        return _half_split_rows(tensor, config.num_kv_heads) if ".wk." in name else tensor

    wanted = dtype or file.natural_dtype()
    tensors = carry_over(config, LAYOUT, file, wanted, convert=convert, progress=progress)
    tokenizer_json, text = text_from_gguf(file)
    return save(dest, config, tensors, text=text, tokenizer_json=tokenizer_json)


def _half_split_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Undo the converter's reordering of q and k rows.

    GGUF pairs features 2j and 2j+1 of a head into rotary plane j; we pair j and j + D/2, as Hugging Face
    does.
    """
    planes = weight.shape[0] // num_heads // 2
    return weight.view(num_heads, planes, 2, -1).transpose(1, 2).reshape(weight.shape)


def _config(file: GgufFile) -> ChainConfig:
    architecture = file.required("general.architecture")
    if architecture != "llama":
        raise UnsupportedModel(f"{file.path}: general.architecture={architecture!r}; only 'llama' can be imported")
    if (parts := _whole(file, "split.count", 1)) > 1:
        raise UnsupportedModel(f"{file.path}: split.count={parts}; join the parts with llama-gguf-split --merge first")
    if experts := file.metadata("llama.expert_count"):
        raise UnsupportedModel(f"{file.path}: llama.expert_count={experts}; mixtures of experts are not supported")
    if EMBEDDING not in file.names():
        raise CheckpointError(f"{file.path}: tensor {EMBEDDING!r} is missing; fetch the whole model again")
    num_heads = _whole(file, "llama.attention.head_count")
    num_kv_heads = _whole(file, "llama.attention.head_count_kv", num_heads)
    dim = _whole(file, "llama.embedding_length")
    head_dim = _whole(file, "llama.attention.key_length", dim // num_heads if num_heads > 0 else 1)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if _whole(file, key, head_dim) != head_dim:
            raise UnsupportedModel(f"{file.path}: {key}={file.metadata(key)} must equal the head dim {head_dim}")
    base = chain_config(
        file.path,
        dim=dim,
        hidden_dim=_whole(file, "llama.feed_forward_length"),
        num_layers=_whole(file, "llama.block_count"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        vocab_size=file.shape(EMBEDDING)[0],
        rope_theta=_number(file, "llama.rope.freq_base", 10_000.0),
        rope_scaling=_named_scaling(file),
        norm_eps=file.required("llama.attention.layer_norm_rms_epsilon"),
        tie_embeddings=HEAD not in file.names(),
        max_context=_whole(file, "llama.context_length"),
        explicit_head_dim=head_dim,
    )
    return base if ROPE_FACTORS not in file.names() else _with_llama3_scaling(file, base)


def _whole(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.metadata(key)
    if value is None:
        value = file.required(key) if default is None else default
    if isinstance(value, bool) or not isinstance(value, int):
        raise UnsupportedModel(f"{file.path}: {key}={value!r:.80} must be one number; layers may not differ in shape")
    return value


def _number(file: GgufFile, key: str, default: float) -> float:
    value = file.metadata(key)
    if value is None or value == 0:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnsupportedModel(f"{file.path}: {key}={value!r:.80} must be one number")
    return float(value)


def _named_scaling(file: GgufFile) -> RopeScaling | None:
    kind = file.metadata("llama.rope.scaling.type")
    # Files older than the key `scaling.type` have `scale_linear` alone.
    factor = _number(file, "llama.rope.scaling.factor", _number(file, "llama.rope.scale_linear", 1.0))
    if kind == "none" or (kind is None and factor == 1.0):
        return None
    if kind not in ("linear", "yarn", None):
        raise UnsupportedModel(
            f"{file.path}: llama.rope.scaling.type={kind!r} is not supported; use none, linear or yarn"
        )
    try:
        return RopeScaling(kind="linear", factor=factor) if kind != "yarn" else _yarn(file, factor)
    except ValueError as err:
        raise UnsupportedModel(f"{file.path}: {err}") from err


def _yarn(file: GgufFile, factor: float) -> RopeScaling:
    """As llama.cpp reads it, whose `attn_factor` comes on top of the paper's attention factor."""
    key = "llama.rope.scaling."
    for name, usual in (("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        value = file.metadata(key + name)
        if value not in (None, usual):
            raise UnsupportedModel(f"{file.path}: {key}{name}={value} is not supported; only {usual} is")
    attn_factor = _number(file, key + "attn_factor", 1.0)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_context=_whole(file, key + "original_context_length", _whole(file, "llama.context_length")),
        beta_fast=_number(file, key + "yarn_beta_fast", 32.0),
        beta_slow=_number(file, key + "yarn_beta_slow", 1.0),
        attention_factor=None if attn_factor == 1.0 else attn_factor * yarn_attention_factor(factor),
    )


def _with_llama3_scaling(file: GgufFile, config: ChainConfig) -> ChainConfig:
    """Find the llama3 parameters whose frequencies are the file's.

    The file holds one divisor for each rotary plane, by which its frequency is divided. The slowest plane's divisor is
    `factor`. The two bounds are 1 and 4, as in all published models. The context of pre-training is searched for.
    """
    divisors = file.read(ROPE_FACTORS).flatten()
    if (
        config.rope_scaling is None
        and divisors.numel() == config.head_dim // 2
        and is_finite(divisors)
        and divisors.min() >= 1.0
    ):
        if bool((divisors == 1.0).all()):
            return config
        expected = inverse_frequencies(config) / divisors
        for context in LLAMA3_ORIGINAL_CONTEXTS:
            try:
                scaling = RopeScaling(kind="llama3", factor=float(divisors.max()), original_max_context=context)
            except ValueError:
                break
            candidate = replace(config, rope_scaling=scaling)
            if torch.allclose(inverse_frequencies(candidate), expected, rtol=ROPE_FACTOR_TOLERANCE, atol=0.0):
                return candidate
    raise UnsupportedModel(
        f"{file.path}: tensor {ROPE_FACTORS!r} holds no known llama3 scaling (low_freq_factor 1, "
        "high_freq_factor 4, original context a power of two); import the Hugging Face directory instead"
    )
