"""Other software that prefills the baseline's shape, beside ours in the same turns; each is optional.

A peer is imported when it is first asked for. One that is not installed, or cannot run here, is *absent*: the reason
goes into the record, and nothing fails.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.util import find_spec
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.peers.weights import RepeatedWeights
from colm.checkpoint import WeightSource
from colm.model.config import ChainConfig
from colm.model.transformer import slice_config

BASELINE: Final = "llama-3.2-1b"
"""The preset whose shape peers run."""
LENGTHS: Final = tuple(512 << power for power in range(5))
INSTALL: Final = "pip install 'colm-serve[peers]'"


class PeerAbsent(Exception):
    """A peer cannot run here; the message says why and, where there is one, the way out."""


class Peer(Protocol):
    """A model that is loaded."""

    @property
    def version(self) -> str:
        """Of the software."""

    def prefill(self, token_ids: NDArray[np.int64]) -> Tensor:
        """Read a prompt from nothing, keys and values of every layer kept; returns the last token's logits_V."""


Open = Callable[[WeightSource, torch.dtype, int], AbstractContextManager[Peer]]
"""(weights of a LLaMA with a tied head, dtype, longest prompt) to a peer, for as long as the context lasts."""


def _transformers(weights: WeightSource, dtype: torch.dtype, max_tokens: int) -> AbstractContextManager[Peer]:
    from bench.peers.hugging_face import open_transformers

    return open_transformers(weights, dtype, max_tokens)


def _llama_cpp(weights: WeightSource, dtype: torch.dtype, max_tokens: int) -> AbstractContextManager[Peer]:
    from bench.peers.llama_cpp import open_llama_cpp

    return open_llama_cpp(weights, dtype, max_tokens)


PEERS: Final[Mapping[str, Open]] = {"transformers": _transformers, "llama.cpp": _llama_cpp}
"""By name, in the order of tables."""

_MODULES: Final = {"transformers": "transformers", "llama.cpp": "llama_cpp"}


def is_installed(name: str) -> bool:
    """Whether a peer's package is there; nothing is imported."""
    return find_spec(_MODULES[name]) is not None


def weights_for(config: ChainConfig, dtype: torch.dtype, seed: int) -> WeightSource:
    """Random weights of a baseline's shape, quickly made.

    The head is tied, as that of LLaMA-3.2-1B is: a prefill multiplies one row with it, and it takes memory.
    """
    assert slice_config(config, 1) == config, "peers know no chains"
    return RepeatedWeights(config=replace(config, tie_embeddings=True), dtype=dtype, seed=seed)
