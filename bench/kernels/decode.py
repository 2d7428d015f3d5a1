"""Decode attention over pages."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from colm_kernels import native, tolerance
from colm_kernels.decode_attention import decode_attention
from colm_kernels.native import use_variant
from torch import Tensor

from bench.harness.contest import Contest
from bench.kernels.common import KernelCase, against_reading, short
from colm.defaults import PAGE_TOKENS
from colm.huge_pages import side_by_side


@dataclass(frozen=True, kw_only=True)
class DecodeCase(KernelCase):
    """The last `num_queries` tokens of each request against its `context_len` cached ones."""

    batch: int
    context_len: int
    num_kv_heads: int
    group: int
    head_dim: int
    num_queries: int = 1
    int8_pages: bool = False

    @property
    def name(self) -> str:
        """The shape in one word."""
        pages = "_int8" if self.int8_pages else ""
        return (
            f"decode_{short(self.dtype)}{pages}_b{self.batch}_q{self.num_queries}_k{self.context_len}"
            f"_h{self.num_kv_heads * self.group}_kv{self.num_kv_heads}_d{self.head_dim}"
        )

    @property
    def score_dtype(self) -> torch.dtype:
        """The dtype of the scores' products."""
        return torch.float32 if self.int8_pages else self.dtype

    @property
    def variant(self) -> native.Variant:
        """The variant that runs the case by default."""
        return native.choose_memory_bound_variant(self.head_dim, torch.empty(0, dtype=self.score_dtype))

    @property
    def num_bytes(self) -> int:
        """Keys, values and their scales that one call reads."""
        per_head = self.head_dim + 2 if self.int8_pages else self.head_dim * self.dtype.itemsize
        return 2 * self.batch * self.context_len * self.num_kv_heads * per_head

    def inputs(self, seed: int) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], dict[str, Any]]:
        """Arguments of `decode_attention`, the block table in random order, and its options."""
        generator = torch.Generator().manual_seed(seed)
        num_pages = self.batch * self.context_len // PAGE_TOKENS
        shape = (num_pages, PAGE_TOKENS, self.num_kv_heads, self.head_dim)
        options: dict[str, Any] = {
            "cu_seqlens_q_R1": torch.arange(self.batch + 1, dtype=torch.int32) * self.num_queries
        }
        if self.int8_pages:
            k_pages, v_pages = (torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator) for _ in "kv")
            scales = (torch.rand(2, *shape[:3], generator=generator) / 100).bfloat16()
            options |= {"k_scales_BPK": scales[0], "v_scales_BPK": scales[1]}
        else:
            k_pages, v_pages = (torch.randn(shape, generator=generator).to(self.dtype) for _ in "kv")
        # In huge pages where the system has them, as a node's are.
        k_pages, v_pages = side_by_side({"keys": k_pages, "values": v_pages}, k_pages.dtype).values()
        q = torch.randn(
            self.batch * self.num_queries, self.num_kv_heads, self.group, self.head_dim, generator=generator
        )
        block_table = torch.randperm(num_pages, generator=generator).to(torch.int32).view(self.batch, -1)
        context_lens = torch.full((self.batch,), self.context_len, dtype=torch.int32)
        return (q.to(self.dtype), k_pages, v_pages, block_table, context_lens), options

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """Every variant of this machine, the PyTorch path and plain reading."""
        arguments, options = self.inputs(seed)
        expected = tolerance.decode_attention(*arguments, **options)

        def run(variant: native.Variant) -> Tensor:
            with use_variant(variant):
                return decode_attention(*arguments, **options)

        yield against_reading(
            run,
            lambda variant: expected.check(run(variant)),
            dtype=self.score_dtype,
            ours=self.variant,
            num_bytes=self.num_bytes,
        )


DECODE_CASES = (
    DecodeCase(batch=1, context_len=65536, num_kv_heads=8, group=1, head_dim=64),
    DecodeCase(batch=1, context_len=65536, num_kv_heads=8, group=4, head_dim=64),
    DecodeCase(batch=8, context_len=65536, num_kv_heads=2, group=4, head_dim=64),
    DecodeCase(batch=1, context_len=65536, num_kv_heads=8, group=4, head_dim=64, int8_pages=True),
    DecodeCase(batch=8, context_len=65536, num_kv_heads=2, group=4, head_dim=64, int8_pages=True),
    DecodeCase(batch=1, context_len=65536, num_kv_heads=8, group=4, head_dim=64, num_queries=4),
    *(
        DecodeCase(batch=batch, context_len=6400, num_kv_heads=3, group=3, head_dim=64, int8_pages=int8_pages)
        for batch in (1, 8)
        for int8_pages in (False, True)
    ),
)
