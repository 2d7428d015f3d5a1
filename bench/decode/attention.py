"""Decode attention alone, over pages of either format, beside plain reading."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from colm_kernels import native, tolerance
from colm_kernels.decode_attention import library_args

from bench.harness.contest import Bar, Case, Contest, Run, timed
from bench.kernels.common import read_ceiling
from bench.kernels.decode import DecodeCase as KernelCase

WANTED_OF_READING: Final = {"bf16": 0.7, "int8": 0.6}
"""Of the rate of reading, by the pages' format."""
CACHE_BYTES: Final = 96 << 20
"""More than the caches of a desktop or of a rented share of a server hold."""


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """A call of the library a layer, as a step makes them, of as many layers as no cache holds."""

    kernel: KernelCase

    @property
    def name(self) -> str:
        """The shape in one word."""
        return f"attention_{self.kernel.name}"

    @property
    def shape(self) -> dict[str, Any]:
        """The operation's."""
        return self.kernel.shape

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """The default variant over pages of bf16 and of int8."""
        kernels = {"bf16": self.kernel, "int8": replace(self.kernel, int8_pages=True)}
        layers = {
            name: [_Call(kernel, seed + layer) for layer in range(-(-CACHE_BYTES // kernel.num_bytes))]
            for name, kernel in kernels.items()
        }

        def check() -> None:
            for first, *_ in layers.values():
                first.run()
                tolerance.decode_attention(*first.arguments, **first.options).check(first.out_TKGD)

        def turn(name: str) -> Run:
            def attend() -> None:
                for call in layers[name]:
                    call.run()

            return timed(attend, num_calls=len(layers[name]), gb=kernels[name].num_bytes / 1e9)

        yield Contest(
            check=check,
            contenders={**{name: turn(name) for name in kernels}, "read": read_ceiling()},
            ours="bf16",
            against=["int8", "read"],
            compared_by="gb_per_s",
            bars=[
                Bar(f"{name}_of_reading", [name], over=["read"], at_least=wanted)
                for name, wanted in WANTED_OF_READING.items()
            ],
        )


class _Call:
    """One call of the library over tensors of its own, without the operation's checks, which no step pays."""

    def __init__(self, kernel: KernelCase, seed: int) -> None:
        self.arguments, self.options = kernel.inputs(seed)
        self.out_TKGD = torch.empty_like(self.arguments[0])
        self._variant = native.choose_memory_bound_variant(kernel.head_dim, self.arguments[0])
        scales = (self.options.get("k_scales_BPK"), self.options.get("v_scales_BPK"))
        self._args = library_args(*self.arguments, self.options["cu_seqlens_q_R1"], *scales, self.out_TKGD)

    def run(self) -> None:
        """Write `out_TKGD`."""
        native.call("colm_decode_attention", self._args, self._variant, torch.get_num_threads())


def attention_cases() -> list[AttentionCase]:
    """Chain 1 of SmolLM2, and of a 1B in four chains."""
    shapes = ((1, 6400, 3, 3), (8, 6400, 3, 3), (1, 65536, 3, 3), (1, 65536, 8, 4))
    return [
        AttentionCase(kernel=KernelCase(batch=b, context_len=tokens, num_kv_heads=heads, group=group, head_dim=64))
        for b, tokens, heads, group in shapes
    ]
