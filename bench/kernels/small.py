"""The small operations between the products: RMSNorm, rotary and cache write, SwiGLU, int8 KV."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from colm_kernels import native, tolerance
from colm_kernels.kv_quantise import dequantise_kv, quantise_kv, quantise_kv_reference, write_dequantised_kv
from colm_kernels.native import use_variant
from colm_kernels.rms_norm import add_rms_norm_
from colm_kernels.rotary import write_kv
from colm_kernels.swiglu import swiglu_
from torch import Tensor

from bench.harness.contest import Contest
from bench.kernels.common import KernelCase, against_reading, short

CALLS = 20
"""Calls in one turn: a single call of one row is too short for the clock."""


@dataclass(frozen=True, kw_only=True)
class SmallCase(KernelCase):
    """One operation on the rows of a decode step or of a prefill tile."""

    num_rows: int

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """What one call reads and writes."""

    @abstractmethod
    def prepare(self, seed: int) -> tuple[Callable[[], object], Callable[[], None]]:
        """Make the call, repeatable with the same inputs, and its check against the definition."""

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """Every variant of this machine, the PyTorch path and plain reading."""
        call, check = self.prepare(seed)

        @torch.inference_mode()
        def run(variant: native.Variant) -> None:
            with use_variant(variant):
                for _ in range(CALLS):
                    call()

        def check_variant(variant: native.Variant) -> None:
            with use_variant(variant):
                check()

        yield against_reading(
            run,
            check_variant,
            dtype=torch.float32,
            ours=native.default_variant(torch.float32),
            num_bytes=self.num_bytes,
            num_calls=CALLS,
        )

    def draw(self, seed: int, *shape: int) -> Tensor:
        """Normal numbers, the same ones at every call."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype)


@dataclass(frozen=True, kw_only=True)
class NormCase(SmallCase):
    """Add the residual and normalise every chain."""

    dims: Sequence[int]

    @property
    def name(self) -> str:
        """The shape in one word."""
        return f"add_rms_norm_{short(self.dtype)}_r{self.num_rows}_d{'_'.join(map(str, self.dims))}"

    @property
    def num_bytes(self) -> int:
        """Bytes of the residual stream twice, of delta and of y."""
        return 4 * self.num_rows * sum(self.dims) * self.dtype.itemsize

    def prepare(self, seed: int) -> tuple[Callable[[], object], Callable[[], None]]:
        """Add zeros, so that x does not change from call to call."""
        x, gains = self.draw(seed, self.num_rows, sum(self.dims)), [self.draw(seed, dim) for dim in self.dims]
        delta = torch.zeros_like(x)

        def check() -> None:
            tolerance.rms_norm(x, gains, 1e-5).check(add_rms_norm_(x, delta, gains, 1e-5))

        return lambda: add_rms_norm_(x, delta, gains, 1e-5), check


@dataclass(frozen=True, kw_only=True)
class RotaryCase(SmallCase):
    """Rotate keys, and write them and the values into a kv-head major cache."""

    num_heads: int
    head_dim: int

    @property
    def name(self) -> str:
        """The shape in one word."""
        return f"write_kv_{short(self.dtype)}_t{self.num_rows}_kv{self.num_heads}_d{self.head_dim}"

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values in and out, of cosines and sines."""
        kv_bytes = 4 * self.num_rows * self.num_heads * self.head_dim * self.dtype.itemsize
        return kv_bytes + 4 * self.num_rows * self.head_dim

    def prepare(self, seed: int) -> tuple[Callable[[], object], Callable[[], None]]:
        """Write into the middle of a longer cache."""
        k, v = self.draw(seed, 2, self.num_rows, self.num_heads, self.head_dim)
        angles = torch.linspace(0, 1000, self.num_rows * self.head_dim).view(self.num_rows, self.head_dim)
        cos, sin = angles.cos(), angles.sin()
        caches = torch.zeros(2, self.num_heads, 3 * self.num_rows, self.head_dim, dtype=self.dtype)
        k_tile, v_tile = (cache[:, self.num_rows : 2 * self.num_rows].transpose(0, 1) for cache in caches)

        def check() -> None:
            write_kv(k, v, cos, sin, k_tile, v_tile)
            tolerance.rotary(k, cos, sin).check(k_tile)
            assert torch.equal(v_tile, v)

        return lambda: write_kv(k, v, cos, sin, k_tile, v_tile), check


@dataclass(frozen=True, kw_only=True)
class SwigluCase(SmallCase):
    """silu(gate) * up in place."""

    dim: int

    @property
    def name(self) -> str:
        """The shape in one word."""
        return f"swiglu_{short(self.dtype)}_r{self.num_rows}_f{self.dim}"

    @property
    def num_bytes(self) -> int:
        """Bytes of gate twice and of up."""
        return 3 * self.num_rows * self.dim * self.dtype.itemsize

    def prepare(self, seed: int) -> tuple[Callable[[], object], Callable[[], None]]:
        """Take up = 1 + exp(-gate), so that every call gives gate again. Negative gates stay clear of subnormals."""
        gate = -self.draw(seed, self.num_rows, self.dim).abs()
        up = 1 + (-gate).exp()

        def check() -> None:
            tolerance.swiglu(gate, up).check(swiglu_(gate.clone(), up))

        return lambda: swiglu_(gate, up), check


@dataclass(frozen=True, kw_only=True)
class QuantiseCase(SmallCase):
    """Keys or values to int8."""

    num_heads: int
    head_dim: int

    @property
    def name(self) -> str:
        """The shape in one word."""
        return f"quantise_kv_{short(self.dtype)}_t{self.num_rows}_kv{self.num_heads}_d{self.head_dim}"

    @property
    def num_bytes(self) -> int:
        """Bytes in, bytes out, and a scale a row."""
        return self.num_rows * self.num_heads * (self.head_dim * (self.dtype.itemsize + 1) + 2)

    def prepare(self, seed: int) -> tuple[Callable[[], object], Callable[[], None]]:
        """Quantise into new tensors."""
        x = self.draw(seed, self.num_rows, self.num_heads, self.head_dim)

        def check() -> None:
            for result, expected in zip(quantise_kv(x), quantise_kv_reference(x), strict=True):
                assert torch.equal(result, expected)

        return lambda: quantise_kv(x), check


@dataclass(frozen=True, kw_only=True)
class DequantiseCase(SmallCase):
    """int8 keys or values out of a message, head by head, into pages, token by token."""

    num_heads: int
    head_dim: int

    @property
    def name(self) -> str:
        """The shape in one word."""
        return f"dequantise_kv_{short(self.dtype)}_t{self.num_rows}_kv{self.num_heads}_d{self.head_dim}"

    @property
    def num_bytes(self) -> int:
        """Bytes in, a scale a row, and bytes out."""
        return self.num_rows * self.num_heads * (self.head_dim * (self.dtype.itemsize + 1) + 2)

    def prepare(self, seed: int) -> tuple[Callable[[], object], Callable[[], None]]:
        """Write into the same rows again and again."""
        q, scale = quantise_kv_reference(self.draw(seed, self.num_rows, self.num_heads, self.head_dim))
        q, scale = (each.transpose(0, 1).contiguous().transpose(0, 1) for each in (q, scale))
        out = torch.empty(q.shape, dtype=self.dtype)

        def check() -> None:
            write_dequantised_kv(q, scale, out)
            assert torch.equal(out, dequantise_kv(q, scale, self.dtype))

        return lambda: write_dequantised_kv(q, scale, out), check


SMALL_CASES: Sequence[SmallCase] = tuple(
    case
    for dtype in (torch.bfloat16, torch.float32)
    for num_rows in (1, 8, 512)
    for case in (
        NormCase(num_rows=num_rows, dims=(576,) if num_rows == 512 else (576, 192), dtype=dtype),
        RotaryCase(num_rows=num_rows, num_heads=3, head_dim=64, dtype=dtype),
        SwigluCase(num_rows=num_rows, dim=1536 if num_rows == 512 else 2048, dtype=dtype),
        QuantiseCase(num_rows=num_rows, num_heads=3, head_dim=64, dtype=dtype),
        DequantiseCase(num_rows=num_rows, num_heads=3, head_dim=64, dtype=dtype),
    )
)
"""Decode steps of one and eight requests, and a prefill tile, of a model of 135M parameters."""
