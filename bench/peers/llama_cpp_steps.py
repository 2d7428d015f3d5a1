"""Decode steps of llama.cpp, in a process of its own.

Its OpenMP threads must spin between two operations: asked to sleep by OMP_WAIT_POLICY=PASSIVE, as our own benchmarks
are run, a step takes more than twice as long. In our process, spinning threads would slow our turns.
"""

import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from bench.harness.contest import Run
from bench.peers import PeerAbsent
from bench.peers.llama_cpp import LlamaCpp, open_gguf

_SPINS = "GOMP_SPINCOUNT", "300000"
"""GNU OpenMP's own default where no policy is set; our package sets one, which would make it 0."""
_SPIN_S = 0.02
"""After a turn, threads of OpenMP spin for some milliseconds."""

_peer: LlamaCpp | None = None
"""Of this process, if it is the peer's; `_held` keeps it open until the process ends."""
_held = ExitStack()


@contextmanager
def steps_of_gguf(path: Path, context_len: int, seed: int) -> Iterator[Run]:
    """A turn that reads one token behind `context_len` - 1 random ones, as the file's own types are.

    Raises:
        PeerAbsent: llama-cpp-python is not installed, or cannot read the file.
    """
    with patch.dict(os.environ, [_SPINS]), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        reason = pool.submit(_begin, path, context_len, seed, torch.get_num_threads()).result()
        if reason is not None:
            raise PeerAbsent(reason)

        def turn() -> Mapping[str, float]:
            return pool.submit(_step, context_len - 1).result()

        yield turn


def _begin(path: Path, context_len: int, seed: int, num_threads: int) -> str | None:
    """Load the file and read the context; returns why not, if so."""
    global _peer
    torch.set_num_threads(num_threads)
    try:
        _peer = _held.enter_context(open_gguf(path, context_len + 1))
    except PeerAbsent as err:
        return str(err)
    _peer.prefill(np.random.default_rng(seed).integers(3, _peer.model.n_vocab(), context_len - 1))
    return None


def _step(num_cached: int) -> Mapping[str, float]:
    assert _peer is not None, "begun"
    _peer.step(num_cached)  # wakes the threads, as the step before it does in an answer
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    _peer.step(num_cached)
    seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    time.sleep(_SPIN_S)
    return {"s": seconds, "tokens_per_s": 1 / seconds, "cpu_s": cpu_s}
