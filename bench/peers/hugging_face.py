"""transformers' LLaMA: `LlamaForCausalLM` with PyTorch's scaled_dot_product_attention."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.peers import INSTALL, PeerAbsent
from colm.checkpoint import WeightSource
from colm.convert.export import shape_fields
from colm.convert.huggingface import layout_of
from colm.convert.llama import source_names
from colm.model.config import ChainConfig


@dataclass(frozen=True)
class _Transformers:
    model: Any
    version: str

    @torch.inference_mode()
    def prefill(self, token_ids: NDArray[np.int64]) -> Tensor:
        """The ordinary forward with a cache; the head reads the last row alone."""
        found = self.model(input_ids=torch.from_numpy(token_ids).unsqueeze(0), use_cache=True, logits_to_keep=1)
        logits_V: Tensor = found.logits[0, -1]
        return logits_V


@contextmanager
def open_transformers(weights: WeightSource, dtype: torch.dtype, _max_tokens: int) -> Iterator[_Transformers]:
    """The model on the CPU, with these weights; its cache grows with the prompt.

    Raises:
        PeerAbsent: transformers is not installed.
    """
    try:
        import transformers
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    except ImportError as err:
        raise PeerAbsent(f"transformers is not installed; {INSTALL}") from err
    config = transformers.LlamaConfig(**_config(weights.config))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    names = source_names(weights.config, layout_of(weights.config))
    tensors = {theirs: weights.tensors([ours])[ours].to(dtype) for ours, theirs in names.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its frequencies are no weights: still without values
    yield _Transformers(model.eval(), transformers.__version__)


def _config(config: ChainConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        assert scaling.kind == "llama3", "the paper's baselines have no other"
        rope |= {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_context,
        }
    return {
        **shape_fields(config),
        "rope_parameters": rope,
        "tie_word_embeddings": True,
        "attn_implementation": "sdpa",
        "bos_token_id": None,
        "eos_token_id": None,
    }
