"""Where a prefill goes: the time inside the functions that make it up."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

from colm.model import block
from colm.model.attention import ChainAttention
from colm.model.ffn import ChainFFN
from colm.model.linear import ChainLinear
from colm.model.norm import ChainRMSNorm
from colm.model.rope import Rope
from prefill_node import engine, tile_cache

Parts = Mapping[str, Sequence[tuple[object, str]]]

PARTS: Parts = {
    "norms": ((ChainRMSNorm, "forward"), (ChainRMSNorm, "add_")),
    "qkv": tuple((ChainAttention, name) for name in ("queries", "keys_values", "queries_keys_values")),
    "rotation": ((Rope, "range"), (Rope, "tables"), (block, "rotate_"), (tile_cache, "write_kv")),
    "attention": ((engine, "prefill_attention"),),
    "ffn": ((ChainFFN, "forward"),),
    # The output projection is the one linear that none of the others calls.
    "output": ((ChainLinear, "forward"),),
}
"""By part, the functions that are timed, each where it is looked up. Writing keys and values is part of `rotation`."""


@contextmanager
def parts_timed(parts: Parts = PARTS, clock: Callable[[], float] = time.perf_counter) -> Iterator[Mapping[str, float]]:
    """Add up the seconds of every part while the context lasts, in this thread.

    A part inside another counts for the outer one.
    """
    seconds = dict.fromkeys(parts, 0.0)
    is_inside = False

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_inside
            if is_inside:
                return function(*args, **kwargs)
            is_inside, start = True, clock()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[part] += clock() - start
                is_inside = False

        return call

    with ExitStack() as stack:
        for part, places in parts.items():
            for owner, name in places:
                stack.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        yield seconds
