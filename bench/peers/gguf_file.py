"""Writes a LLaMA as a GGUF file, without a tokenizer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from colm.checkpoint import WeightSource
from colm.convert.gguf import LAYOUT, ROPE_FACTORS
from colm.convert.llama import source_names
from colm.model import parameter_shapes
from colm.model.config import ChainConfig
from colm.model.rope import inverse_frequencies

_TYPES = {
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
_ANY = np.dtype(np.float32)
"""Where the type is said, the writer asks only that it is not that of bytes."""


def write_gguf(path: Path, weights: WeightSource, dtype: torch.dtype) -> None:
    """Write matrices in the dtype and gains in float32, as converters do; one tensor at a time is held.

    Args:
        path: of the file.
        weights: of a model of one chain without biases.
        dtype: float32, float16 or bfloat16.
    """
    config = weights.config
    kind, file_type = _TYPES[dtype]
    writer = GGUFWriter(path, "llama")
    _metadata(writer, config)
    writer.add_file_type(file_type)
    names, shapes = source_names(config, LAYOUT), parameter_shapes(config)
    for ours, theirs in names.items():
        shape = shapes[ours]
        of_tensor, width = (kind, dtype.itemsize) if len(shape) == 2 else (GGMLQuantizationType.F32, 4)
        writer.add_tensor_info(theirs, shape, _ANY, shape.numel() * width, raw_dtype=of_tensor)
    divisors = _rope_divisors(config)
    writer.add_tensor_info(ROPE_FACTORS, divisors.shape, _ANY, 4 * divisors.numel(), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for ours in names:
        tensor = weights.tensors([ours])[ours].to(dtype if len(shapes[ours]) == 2 else torch.float32)
        if ".wq." in ours:
            tensor = _interleaved_rows(tensor, config.num_heads)
        elif ".wk." in ours:
            tensor = _interleaved_rows(tensor, config.num_kv_heads)
        writer.write_tensor_data(_bytes(tensor))
    writer.write_tensor_data(divisors.numpy())
    writer.close()


def _metadata(writer: GGUFWriter, config: ChainConfig) -> None:
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _rope_divisors(config: ChainConfig) -> Tensor:
    """By which each rotary plane's frequency is divided."""
    return inverse_frequencies(replace(config, rope_scaling=None)) / inverse_frequencies(config)


def _interleaved_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of q or k in GGUF's order: a head's features 2j and 2j+1 are its rotary plane j; ours are j and j + E/2."""
    planes = weight.shape[0] // num_heads // 2
    return weight.view(num_heads, 2, planes, -1).transpose(1, 2).reshape(weight.shape)


def _bytes(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return tensor.contiguous().view(torch.uint8).numpy()
