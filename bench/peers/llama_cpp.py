"""llama.cpp through llama-cpp-python, from a GGUF file: of the same shape, written for it, or its own.

Its keys and values are in fp16, its default.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.peers import INSTALL, PeerAbsent
from bench.peers.gguf_file import write_gguf
from colm.checkpoint import WeightSource

BATCH_TOKENS = 512
"""Rows that it takes through a layer at once, its own default; ours has tiles of as many."""


@dataclass(frozen=True)
class LlamaCpp:
    """A model that it has loaded."""

    model: Any
    version: str

    def prefill(self, token_ids: NDArray[np.int64]) -> Tensor:
        """Evaluate the prompt in its batches; logits of the last token alone."""
        self.model.reset()
        self.model.eval(token_ids.tolist())
        logits = self.model._ctx.get_logits()  # noqa: SLF001 - the public list of scores is a copy of all rows
        return torch.from_numpy(np.ctypeslib.as_array(logits, shape=(self.model.n_vocab(),)).copy())

    def step(self, num_cached: int) -> None:
        """Read one token behind the first `num_cached` of what `prefill` has read, and compute its logits."""
        self.model.n_tokens = num_cached  # the next evaluation drops the rest of its cache
        self.model.eval([1])


@contextmanager
def open_llama_cpp(weights: WeightSource, dtype: torch.dtype, max_tokens: int) -> Iterator[LlamaCpp]:
    """The model from a file that is deleted once it is loaded, on as many threads as PyTorch has.

    Raises:
        PeerAbsent: llama-cpp-python is not installed, or it cannot read the file.
    """
    with tempfile.TemporaryDirectory(prefix="colm-peer-") as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, weights, dtype)
        # It maps the file, which so can lose its name at once: nobody who is killed later leaves gigabytes.
        peer = _load(path, max_tokens)
    try:
        yield peer
    finally:
        peer.model.close()


@contextmanager
def open_gguf(path: Path, max_tokens: int) -> Iterator[LlamaCpp]:
    """A file as it is, in whatever types its tensors have.

    Raises:
        PeerAbsent: llama-cpp-python is not installed, or it cannot read the file.
    """
    peer = _load(path, max_tokens)
    try:
        yield peer
    finally:
        peer.model.close()


def _load(path: Path, max_tokens: int) -> LlamaCpp:
    try:
        import llama_cpp
    except ImportError as err:
        raise PeerAbsent(f"llama-cpp-python is not installed; {INSTALL}") from err
    threads = torch.get_num_threads()
    try:
        model = llama_cpp.Llama(
            str(path),
            n_ctx=max_tokens,
            n_batch=BATCH_TOKENS,
            n_ubatch=BATCH_TOKENS,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=0,
            verbose=False,
        )
    except (ValueError, RuntimeError) as err:
        raise PeerAbsent(f"llama.cpp {llama_cpp.__version__} does not load {path.name}: {err}") from err
    return LlamaCpp(model, llama_cpp.__version__)
