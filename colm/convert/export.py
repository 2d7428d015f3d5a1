"""Export of chain 1 as a Hugging Face LLaMA directory."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from colm.checkpoint import Checkpoint
from colm.convert.huggingface import ARCHITECTURE, layout_of
from colm.convert.llama import Progress, source_names
from colm.dtypes import dtype_name
from colm.errors import CheckpointError, UnsupportedModel
from colm.model.config import ChainConfig, RopeScaling
from colm.model.transformer import slice_config
from colm.staging import staged
from colm.text.tokenizer_file import parse_tokenizer


def to_huggingface(
    src: str | os.PathLike[str], dest: str | os.PathLike[str], *, progress: Progress | None = None
) -> Path:
    """Write chain 1 of a checkpoint, which is a LLaMA, as `from_huggingface` and transformers read it.

    Args:
        src: an existing checkpoint; with one chain all of it is exported.
        dest: directory to write; it must be missing or empty.
        progress: told after each tensor.

    Returns:
        The directory written: config, generation config, weights and, for a model that reads text, tokenizer and
        chat template.

    Raises:
        UnsupportedModel: a property that LLaMA does not have.
        CheckpointError: `src` is not a checkpoint, or `dest` is in the way.
    """
    source = Checkpoint.open(src)
    config = slice_config(source.config, 1)
    if config.activation != "swiglu":
        raise UnsupportedModel(f"{source.path}: activation={config.activation!r} has no place in a LLaMA; only swiglu")
    target = Path(dest).absolute()
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists; choose another path or remove it")
    names = source_names(config, layout_of(config))
    tensors = {}
    for done, (ours, theirs) in enumerate(names.items(), start=1):
        tensors[theirs] = source.tensors([ours])[ours]
        if progress is not None:
            progress(done, len(names))
    with staged(target) as whole:
        save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
        _write_json(whole / "config.json", _config(source, config))
        _write_json(whole / "generation_config.json", _token_ids(source))
        if (tokenizer_json := source.tokenizer_json()) is not None:
            (whole / "tokenizer.json").write_bytes(tokenizer_json)
            _write_json(whole / "tokenizer_config.json", _tokenizer_config(source, tokenizer_json))
        if source.text.chat_template is not None:
            (whole / "chat_template.jinja").write_text(source.text.chat_template, encoding="utf-8")
    return target


def shape_fields(config: ChainConfig) -> dict[str, Any]:
    """The shape of a model of one chain, in the names of transformers' `LlamaConfig`."""
    return {
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
    }


def _config(source: Checkpoint, config: ChainConfig) -> dict[str, Any]:
    # The rope fields are spelled as before transformers 5, which every version reads.
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        **shape_fields(config),
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "torch_dtype": dtype_name(source.dtype()),
        **_token_ids(source),
    }


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    section: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        section |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_context,
        }
    if scaling.kind == "yarn":
        section |= {
            "original_max_position_embeddings": scaling.original_max_context,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
        if scaling.attention_factor is not None:
            section["attention_factor"] = scaling.attention_factor
    return section


def _token_ids(source: Checkpoint) -> dict[str, Any]:
    return {"bos_token_id": source.text.bos_token_id, "eos_token_id": list(source.text.eos_token_ids) or None}


def _tokenizer_config(source: Checkpoint, tokenizer_json: bytes) -> dict[str, Any]:
    (tokenizer, _), text = parse_tokenizer(tokenizer_json), source.text
    bos_id, eos_id = text.bos_token_id, next(iter(text.eos_token_ids), None)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if bos_id is None else tokenizer.id_to_token(bos_id),
        "eos_token": None if eos_id is None else tokenizer.id_to_token(eos_id),
        "add_bos_token": text.add_bos,
        "model_max_length": source.config.max_context,
    }


def _write_json(path: Path, body: dict[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
