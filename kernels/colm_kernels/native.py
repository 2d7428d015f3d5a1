"""The compiled CPU library: its path, its build flags, and the variants that this CPU can run.

`kernels/build.py` builds it. Without it, or on another kind of CPU, every operation runs in PyTorch.
"""

import ctypes
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Final, Literal, get_args

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Variant = Literal["avx2", "avx512", "avx512_bf16", "torch"]

SANITIZED: Final = os.environ.get("COLM_KERNELS_SANITIZED") == "1"
"""Build and load the library with AddressSanitizer and UndefinedBehaviorSanitizer, whose runtime must be preloaded; see
`make test-sanitize`. The one place where this variable is read."""

FORCED_VARIANT: Final = os.environ.get("COLM_KERNELS_VARIANT") or None
"""The only variant of this process beside "torch", if COLM_KERNELS_VARIANT is set; it shows what a lesser machine runs.
The one place where this variable is read; `available_variants` checks that this machine can run it."""

LIBRARY_PATH: Final = Path(__file__).with_name("_cpu_sanitized.so" if SANITIZED else "_cpu.so")
SOURCE_DIR: Final = Path(__file__).with_name("cpp")
HEAD_DIMS: Final = (16, 64, 80, 96, 128)

SANITIZER_FLAGS: Final = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all") if SANITIZED else ()
COMPILE_FLAGS: Final = (
    "-std=c++20", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall",
    # GCC 12 warns about its own intrinsics headers.
    "-Wno-maybe-uninitialized", "-Wno-uninitialized",
    *(("-O1", "-g", "-fno-omit-frame-pointer", *SANITIZER_FLAGS) if SANITIZED else ("-O3",)),
)  # fmt: skip
_AVX512_FLAGS: Final = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
TARGET_FLAGS: Final = {
    "payload_avx2.cpp": ("-mavx2",),
    "variant_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "variant_avx512.cpp": _AVX512_FLAGS,
    "variant_avx512bf16.cpp": (*_AVX512_FLAGS, "-mavx512bf16", "-mavx512vnni"),
}
"""Target flags of single source files; all others must run on any x86-64."""

# The numbers that the library gives to variants, dtypes and results; see cpu.h and abi.h.
_VARIANT_IDS: Final[dict[Variant, int]] = {"avx2": 0, "avx512": 1, "avx512_bf16": 2}
_DTYPE_IDS: Final = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_CANCELLED, _UNSUPPORTED, _OUT_OF_MEMORY, _BAD_TABLE = 1, 2, 3, 4
_WHOLE_CALL: Final = 1 << 32
"""`kWholeCall` of abi.h."""

_forced: ContextVar[Variant | None] = ContextVar("colm_kernels_variant", default=None)


class Cancelled(Exception):
    """The operation was stopped by its `CancelFlag`; its result is lost."""


class BadTable(ValueError):
    """A page table or a context length points outside the pages."""


class _Flag(ctypes.Structure):
    """`CancelFlag` of abi.h."""

    _fields_ = (("cancelled", ctypes.c_int32), ("done", ctypes.c_int64))


class CancelFlag:
    """Goes with an operation: any thread may set it, to stop that between two of its blocks, and read how far it is."""

    def __init__(self) -> None:
        self._shared = _Flag()

    def set(self) -> None:
        """Stop every operation that was given this flag, now and later."""
        self._shared.cancelled = 1

    def is_set(self) -> bool:
        """Whether `set` has been called."""
        return bool(self._shared.cancelled)

    @property
    def done_share(self) -> float:
        """Share of the work that the operation has done, from 0 to 1; it grows while the operation runs.

        Of the last operation that was given this flag, until the next one begins or `rewind`. Only the library's
        attention says how far it is; other operations leave it as it was.
        """
        return float(self._shared.done / _WHOLE_CALL)

    def rewind(self) -> None:
        """Nothing is done of what comes next."""
        self._shared.done = 0

    def raise_if_set(self) -> None:
        """Stop here.

        Raises:
            Cancelled: `set` has been called.
        """
        if self.is_set():
            raise Cancelled

    @property
    def address(self) -> int:
        """Where the library finds it, valid as long as this object lives."""
        return ctypes.addressof(self._shared)


def source_hash() -> str:
    """Identity of what the library should be built from: sources and flags."""
    digest = hashlib.sha256(repr((COMPILE_FLAGS, sorted(TARGET_FLAGS.items()))).encode())
    for path in sorted(SOURCE_DIR.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def built_hash(path: Path) -> str | None:
    """The `source_hash` that a library was built from; None if no library can be loaded."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    return bytes((ctypes.c_char * 64).in_dll(library, "colm_source_hash")).decode()


@cache
def _library() -> ctypes.CDLL | None:
    if not LIBRARY_PATH.exists():
        return None
    if built_hash(LIBRARY_PATH) != source_hash():
        logger.warning(
            "kernels.library_unusable path=%s: built from other sources or for another machine; "
            "run `python kernels/build.py`. Using PyTorch.",
            LIBRARY_PATH,
        )
        return None
    return ctypes.CDLL(str(LIBRARY_PATH))


@cache
def available_variants() -> tuple[Variant, ...]:
    """The variants that can run here, from the plainest to the most demanding; "torch" is always there.

    Raises:
        ValueError: COLM_KERNELS_VARIANT is none of them.
    """
    library = _library()
    variants: tuple[Variant, ...] = ("torch",)
    if library is not None:
        variants += tuple(name for name, number in _VARIANT_IDS.items() if library.colm_cpu_supports(number))
    if FORCED_VARIANT is None:
        return variants
    if FORCED_VARIANT not in variants:
        raise ValueError(f"COLM_KERNELS_VARIANT={FORCED_VARIANT!r} is not one of {variants}, which can run here")
    return tuple(name for name in variants if name in ("torch", FORCED_VARIANT))


@cache
def default_variant(dtype: torch.dtype) -> Variant:
    """The fastest variant here for tensors of a dtype."""
    usable = list(available_variants())
    library = _library()
    is_free = FORCED_VARIANT is None
    if is_free and "avx512_bf16" in usable and library is not None and not library.colm_bf16_dot_pays():
        usable.remove("avx512_bf16")
    return usable[-1] if dtype.is_floating_point and dtype in _DTYPE_IDS else "torch"


@contextmanager
def use_variant(name: Variant) -> Iterator[None]:
    """Run the operations of this context (thread or task) with one variant, for tests and benchmarks.

    Raises:
        ValueError: this machine or build does not have the variant.
    """
    if name not in get_args(Variant) or name not in available_variants():
        raise ValueError(f"variant {name!r} is not one of {available_variants()}, which can run here")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_variant() -> Variant | None:
    """What `use_variant` set in this thread or task."""
    return _forced.get()


def choose_variant(head_dim: int, *tensors: Tensor) -> Variant:
    """The variant that an operation on these tensors runs with."""
    if head_dim not in HEAD_DIMS or needs_gradient(*tensors):
        return "torch"
    return _forced.get() or default_variant(tensors[0].dtype)


def choose_memory_bound_variant(head_dim: int, *tensors: Tensor) -> Variant:
    """The variant for an operation that memory bounds: products of bf16 pairs, however slow, save the widening."""
    variant = choose_variant(head_dim, *tensors)
    if variant == "avx512" and tensors[0].dtype == torch.bfloat16 and _forced.get() is None:
        return available_variants()[-1]
    return variant


def choose_rows_variant(*tensors: Tensor) -> Variant:
    """The variant for an operation on single rows; "torch" unless every row is contiguous."""
    dtype = tensors[0].dtype
    if dtype not in _DTYPE_IDS:
        return "torch"
    for tensor in tensors:
        if tensor.stride(-1) != 1 or not tensor.is_cpu:
            return "torch"
    if needs_gradient(*tensors):
        return "torch"
    return _forced.get() or default_variant(dtype)


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether an operation on these tensors has to be differentiable."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def dtype_id(dtype: torch.dtype) -> int:
    """The number that the library gives to a dtype."""
    return _DTYPE_IDS[dtype]


def variant_id(variant: Variant) -> int:
    """The number that the library gives to a variant."""
    return _VARIANT_IDS[variant]


def words(values: Sequence[int]) -> "ctypes.Array[ctypes.c_int64]":
    """An array of the library's 64-bit words."""
    return _words_type(len(values))(*values)


@cache
def _words_type(num_words: int) -> "type[ctypes.Array[ctypes.c_int64]]":
    return ctypes.c_int64 * num_words


def resolve_num_threads(num_threads: int | None) -> int:
    """The given number of threads; None takes PyTorch's setting.

    Raises:
        ValueError: below 1.
    """
    if num_threads is None:
        return torch.get_num_threads()
    if num_threads < 1:
        raise ValueError(f"num_threads={num_threads} must be at least 1")
    return num_threads


def call(function: str, args: ctypes.Structure, variant: Variant, num_threads: int) -> None:
    """Run one operation of the library; other Python threads run meanwhile.

    Raises:
        Cancelled: its flag was set.
        BadTable: nothing was computed.
        MemoryError: no room for its workspace.
    """
    library = _library()
    assert library is not None
    status = getattr(library, function)(ctypes.byref(args), _VARIANT_IDS[variant], num_threads)
    if status == _CANCELLED:
        raise Cancelled(function)
    if status == _BAD_TABLE:
        raise BadTable(function)
    if status == _OUT_OF_MEMORY:
        raise MemoryError(f"{function}: no memory for its workspace")
    assert status != _UNSUPPORTED, "choose_variant admits only what the library has"
