"""Import of a Hugging Face LLaMA directory."""

import os
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from colm.checkpoint import Checkpoint, TextConfig, save
from colm.convert.llama import (
    Progress,
    carry_over,
    chain_config,
    check_dtype,
    check_num_layers,
    common_dtype,
    refuse_unknown,
    source_names,
)
from colm.convert.stretch import Stretch
from colm.dtypes import DTYPES
from colm.errors import CheckpointError, UnsupportedModel
from colm.files import MAX_JSON_BYTES, MAX_TOKENIZER_BYTES, read_bytes, read_json_object, read_text, require_weights
from colm.model.config import ChainConfig, RopeScaling, parse_rope_kind, yarn_attention_factor
from colm.text.tokenizer_file import parse_tokenizer, reading

ARCHITECTURE = "LlamaForCausalLM"
HEAD = "lm_head.weight"
_USUAL_CONTEXT = 2048
"""Where the config is silent."""
# Old checkpoints carry the rotary frequencies, which follow from the config.
DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

LAYOUT = {
    "embedding.chain1": "model.embed_tokens.weight",
    "layers.{}.attention_norm.chain1": "model.layers.{}.input_layernorm.weight",
    "layers.{}.attention.wq.chain1": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.wk.chain1": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.wv.chain1": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.wo.chain1": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.ffn_norm.chain1": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.ffn.gate.chain1": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.ffn.up.chain1": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.ffn.down.chain1": "model.layers.{}.mlp.down_proj.weight",
    "final_norm.chain1": "model.norm.weight",
    "head.chain1": HEAD,
}


def layout_of(config: ChainConfig) -> dict[str, str]:
    """Our tensor names against Hugging Face's, with `{}` for the layer."""
    biases = {
        f"{ours}_bias": theirs.replace(".weight", ".bias") for ours, theirs in LAYOUT.items() if "_proj." in theirs
    }
    return LAYOUT | (biases if config.bias else {})


def from_huggingface(
    src_dir: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    stretch: Stretch | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Turn a Hugging Face LLaMA directory into a one-chain checkpoint.

    Args:
        src_dir: holds config.json, model.safetensors or its shards, and, for a model that reads text,
            tokenizer.json.
        dest: directory to write; an older checkpoint there is replaced.
        dtype: dtype of all weights; None keeps the source's, the widest where it mixes several.
        stretch: rope scaling for longer contexts than the source's; None keeps the source's rope.
        progress: told after each tensor.

    Returns:
        The saved checkpoint.

    Raises:
        UnsupportedModel: a property of the model cannot be carried over.
        CheckpointError: a file or tensor is missing, broken or misshapen.
    """
    root = Path(src_dir)
    check_dtype(dtype)
    raw = _read_json(root / "config.json")
    config = _config(root / "config.json", raw)
    if stretch is not None:
        config = stretch.of(root / "config.json", config)
    source = _Weights(root)
    names = source.names()
    check_num_layers(source, config)
    layout = layout_of(config)
    known = set(source_names(config, layout).values()) | {HEAD}
    refuse_unknown(source, known | {name for name in names if DERIVED.fullmatch(name)})
    dtypes = [source.dtype(name) for name in names if name in known]
    if not dtypes:
        raise CheckpointError(f"{source.path} has no tensor of a LLaMA; fetch the whole model again")
    wanted = dtype or common_dtype(dtypes)
    tensors = carry_over(config, layout, source, wanted, progress=progress)
    tokenizer_json = _tokenizer_json(root)
    text = _text_config(root, raw, tokenizer_json)
    return save(dest, config, tensors, text=text, tokenizer_json=tokenizer_json)


class _Weights:
    """The tensors of one safetensors file, or of several behind an index."""

    def __init__(self, root: Path) -> None:
        index, single = root / "model.safetensors.index.json", root / "model.safetensors"
        if index.exists():
            self.path = index
            shards = _read_json(index).get("weight_map")
            if not isinstance(shards, Mapping):
                raise CheckpointError(f"{index}: weight_map is missing; fetch the whole model again")
            for name, shard in shards.items():
                # A path could lead out of the folder.
                if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or "\0" in shard:
                    raise CheckpointError(f"{index}: weight_map[{name!r:.80}]={shard!r:.80} is not a file's name")
            self._file_of = {name: root / shard for name, shard in shards.items()}
        elif single.exists():
            self.path = single
            self._file_of = dict.fromkeys(self._reader(single).keys(), single)
        else:
            raise CheckpointError(
                f"{root} has neither {single.name} nor {index.name}; only safetensors weights are read"
            )
        self._readers: dict[Path, Any] = {}

    def names(self) -> Collection[str]:
        return self._file_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        words = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        word = self._slice(name).get_dtype()
        if word not in words:
            raise UnsupportedModel(
                f"{self.path}: tensor {name!r} is stored as {word}; only {', '.join(DTYPES)} are read, "
                "so import the model before it was quantised"
            )
        return words[word]

    def read(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._open(name).get_tensor(name)
        except SafetensorError as err:
            raise CheckpointError(f"{self._file_of[name]}: tensor {name!r} is broken; fetch the file again") from err
        return tensor

    def _slice(self, name: str) -> Any:
        try:
            return self._open(name).get_slice(name)
        except SafetensorError as err:
            raise CheckpointError(f"{self._file_of[name]}: tensor {name!r} is missing; fetch the file again") from err

    def _open(self, name: str) -> Any:
        path = self._file_of[name]
        if path not in self._readers:
            self._readers[path] = self._reader(path)
        return self._readers[path]

    def _reader(self, path: Path) -> Any:
        try:
            require_weights(path)
            return safe_open(path, framework="pt")
        except FileNotFoundError as err:
            raise CheckpointError(f"{path} is missing, but the index names it; fetch it too") from err
        except (SafetensorError, OSError, RuntimeError) as err:  # the last where it cannot be mapped
            raise CheckpointError(f"{path} is truncated or not a safetensors file: {err}") from err


def _config(path: Path, raw: Mapping[str, Any]) -> ChainConfig:
    architectures = raw.get("architectures") or []
    if architectures != [ARCHITECTURE] and (architectures or raw.get("model_type") != "llama"):
        raise UnsupportedModel(
            f"{path}: architectures={architectures or raw.get('model_type')!r:.80}; only {ARCHITECTURE} can be imported"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(
            f"{path}: hidden_act={raw['hidden_act']!r:.80} is not supported; only hidden_act='silu' is"
        )
    has_bias = bool(raw.get("attention_bias", False))
    if has_bias != bool(raw.get("mlp_bias", False)):
        raise UnsupportedModel(
            f"{path}: attention_bias={has_bias} with mlp_bias={not has_bias} is not supported; only both or neither are"
        )
    if raw.get("quantization_config") is not None:
        raise UnsupportedModel(f"{path}: quantization_config is not supported; import the model it was made from")
    theta, scaling = _rope(path, raw)
    try:
        num_heads = raw["num_attention_heads"]
        return chain_config(
            path,
            dim=raw["hidden_size"],
            hidden_dim=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=raw.get("num_key_value_heads") or num_heads,
            vocab_size=raw["vocab_size"],
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_context=raw.get("max_position_embeddings", _USUAL_CONTEXT),
            explicit_head_dim=raw.get("head_dim"),
            bias=has_bias,
        )
    except KeyError as err:
        raise CheckpointError(f"{path}: {err.args[0]} is missing; is this the model's own config.json?") from err


def _rope(path: Path, raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """The rotary base and its scaling, as transformers 5 spells them (`rope_parameters`) or as before it."""
    field = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    section = raw.get(field) or {}
    if not isinstance(section, Mapping):
        raise UnsupportedModel(f"{path}: {field}={section!r:.80} must be an object")
    theta = section.get("rope_theta", raw.get("rope_theta", 10_000.0))
    kind = section.get("rope_type", section.get("type", "default"))
    partial = section.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UnsupportedModel(f"{path}: partial_rotary_factor={partial} is not supported; only 1.0 is")
    if kind == "default":
        return theta, None
    try:
        known = parse_rope_kind(kind)
    except ValueError as err:
        raise UnsupportedModel(f"{path}: {field}.rope_type={err}") from err
    read = {"linear": lambda *_: {}, "llama3": _llama3, "yarn": _yarn}[known]
    try:
        factor = float(section["factor"])
        return theta, RopeScaling(kind=known, factor=factor, **read(raw, section))
    except KeyError as err:
        raise CheckpointError(f"{path}: {field}.{err.args[0]} is missing, but rope_type={kind!r} needs it") from err
    except (TypeError, ValueError, OverflowError) as err:
        raise UnsupportedModel(f"{path}: {field}: {err}") from err


def _llama3(_: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "low_freq_factor": float(section["low_freq_factor"]),
        "high_freq_factor": float(section["high_freq_factor"]),
        "original_max_context": int(section["original_max_position_embeddings"]),
    }


def _yarn(raw: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers reads it: what is missing, null or zero has its default."""
    original = raw.get("original_max_position_embeddings") or section.get("original_max_position_embeddings")
    attention_factor = section.get("attention_factor")
    mscale, mscale_all_dim = section.get("mscale"), section.get("mscale_all_dim")
    if attention_factor is None and mscale and mscale_all_dim:
        factor = float(section["factor"])
        attention_factor = yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, mscale_all_dim)
    return {
        "original_max_context": int(original or raw.get("max_position_embeddings", _USUAL_CONTEXT)),
        "beta_fast": float(section.get("beta_fast") or 32),
        "beta_slow": float(section.get("beta_slow") or 1),
        "truncate": bool(section.get("truncate", True)),
        "attention_factor": None if attention_factor is None else float(attention_factor),
    }


def _tokenizer_json(root: Path) -> bytes | None:
    path = root / "tokenizer.json"
    if not path.exists():
        warnings.warn(
            f"{root} has no tokenizer.json: the checkpoint serves token ids only; save the tokenizer as "
            "tokenizer.json beside the weights and import again to serve text",
            stacklevel=3,
        )
        return None
    return read_bytes(path, MAX_TOKENIZER_BYTES)


def _text_config(root: Path, raw: Mapping[str, Any], tokenizer_json: bytes | None) -> TextConfig:
    try:
        return _read_text_config(root, raw, tokenizer_json)
    except ValueError as err:
        raise CheckpointError(f"{root}: {err}; correct the model's config files") from err


def _read_text_config(root: Path, raw: Mapping[str, Any], tokenizer_json: bytes | None) -> TextConfig:
    """Stop ids: generation_config.json is the authority, then config.json, then the tokenizer's eos token."""
    generation = _read_json(root / "generation_config.json", required=False)
    eos_ids = _id_list(generation.get("eos_token_id")) or _id_list(raw.get("eos_token_id"))
    bos_id = raw.get("bos_token_id")
    if tokenizer_json is None:
        return TextConfig(bos_token_id=bos_id, eos_token_ids=eos_ids)
    try:
        tokenizer, _ = parse_tokenizer(tokenizer_json)
        begins_with = reading(lambda: tokenizer.encode("a").ids[:1])
    except CheckpointError as err:
        raise CheckpointError(f"{root}: {err}") from err
    section = _read_json(root / "tokenizer_config.json", required=False)
    named_bos, named_eos = (_token_id(tokenizer, section.get(name)) for name in ("bos_token", "eos_token"))
    bos_id = bos_id if named_bos is None else named_bos
    # The tokenizer's post-processor adds the token, unless its config has an explicit setting.
    begins = begins_with == [bos_id]
    add_bos = section.get("add_bos_token")
    return TextConfig(
        bos_token_id=bos_id,
        eos_token_ids=eos_ids or _id_list(named_eos),
        add_bos=bos_id is not None and (begins if add_bos is None else bool(add_bos)),
        chat_template=_chat_template(root, section),
    )


def _chat_template(root: Path, section: Mapping[str, Any]) -> str | None:
    path = root / "chat_template.jinja"
    if path.exists():
        return read_text(path, MAX_JSON_BYTES)
    template = section.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, Mapping) and entry.get("name") == "default"]
        return named[0].get("template") if named else None
    return template


def _token_id(tokenizer: Any, token: object) -> int | None:
    content = token.get("content") if isinstance(token, Mapping) else token
    if content is None:
        return None
    if not isinstance(content, str):
        raise ValueError(f"tokenizer_config.json names the token {content!r:.80}, which is no text")
    found: int | None = tokenizer.token_to_id(content)
    return found


def _id_list(value: Any) -> tuple[int, ...]:
    """Ids of a field that holds one, a list of them, or none; `TextConfig` checks them."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except FileNotFoundError as err:
        if not required:
            return {}
        raise CheckpointError(f"{path} is missing; give the directory of a Hugging Face model") from err
