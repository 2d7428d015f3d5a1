"""Symmetric int8 keys or values with one bf16 scale a token and kv head, in Triton; see colm_kernels/kv_quantise.py.

Shapes: T tokens, K kv heads, D head dim, S rows of the cache.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from colm_kernels.gpu.device import on_its_device
from colm_kernels.gpu.specimen import ARCHS, Arch, Config, Specimen, power_of_two

INFINITY_BITS: Final = tl.constexpr(0x7F800000)
BF16_NAN_BITS: Final = tl.constexpr(0x7FC0)
ROUND_TO_INTEGER: Final = tl.constexpr(1.5 * 2**23)
"""Adding it to a small float and subtracting it again rounds that float to an integer, half to even."""


@triton.jit
def _quantise_kernel(
    x, q, scale_bits, slots, num_heads, x_stride_t, x_stride_k, q_stride_s, q_stride_k, scale_stride_s, scale_stride_k,
    MAPPED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(num_heads, BLOCK_K)
    token = (tl.program_id(0) // num_blocks).to(tl.int64)
    heads_K = tl.program_id(0) % num_blocks * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
    dims_D = tl.arange(0, BLOCK_D)
    is_head_K = heads_K < num_heads
    is_inside_KD = is_head_K[:, None] & (dims_D < D)[None, :]
    row = tl.load(slots + token) if MAPPED else token
    x_KD = tl.load(
        x + token * x_stride_t + heads_K[:, None] * x_stride_k + dims_D[None, :], mask=is_inside_KD, other=0.0
    ).to(tl.float32)
    # The bits of magnitudes compare as the magnitudes do, with NaN above infinity; a maximum of floats would skip NaN.
    amax_bits_K = tl.max(x_KD.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    scale_K = tl.div_rn(amax_bits_K.to(tl.float32, bitcast=True), 127.0)
    # Rounded up to bf16: 0xffff carries into the upper half wherever the lower is not zero.
    bits_K = tl.where(amax_bits_K < INFINITY_BITS, (scale_K.to(tl.int32, bitcast=True) + 0xFFFF) >> 16, BF16_NAN_BITS)
    scale_K = (bits_K << 16).to(tl.float32, bitcast=True)
    q_KD = (tl.div_rn(x_KD, scale_K[:, None]) + ROUND_TO_INTEGER) - ROUND_TO_INTEGER
    q_KD = tl.where((scale_K > 0.0)[:, None], q_KD, 0.0)
    tl.store(
        q + row * q_stride_s + heads_K[:, None] * q_stride_k + dims_D[None, :], q_KD.to(tl.int8), mask=is_inside_KD
    )
    tl.store(scale_bits + row * scale_stride_s + heads_K * scale_stride_k, bits_K.to(tl.int16), mask=is_head_K)


def config(block_d: int, num_heads: int) -> Config:
    """Heads of a program: up to 1024 elements; 8 elements a thread are one load of 16 bytes in bf16."""
    block_k = max(min(power_of_two(num_heads), 1024 // block_d), 1)
    return Config(blocks={"BLOCK_K": block_k}, num_warps=max(block_k * block_d // 256, 1), num_stages=1)


def quantise_kv(x_TKD: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise_kv` of checked arguments, in one launch."""
    q_TKD = x_TKD.new_empty(x_TKD.shape, dtype=torch.int8)
    scale_TK = x_TKD.new_empty(x_TKD.shape[:2], dtype=torch.bfloat16)
    write_quantised_kv(x_TKD, q_TKD, scale_TK)
    return q_TKD, scale_TK


@on_its_device
def write_quantised_kv(
    x_TKD: Tensor, q_cache_SKD: Tensor, scale_cache_SK: Tensor, slot_mapping_T: Tensor | None = None
) -> None:
    """`write_quantised_kv` of checked arguments, in one launch; slots are not checked.

    Reading the slots on the host would wait for the device.

    Raises:
        ValueError: the cache's last dimension is not contiguous.
    """
    if q_cache_SKD.stride(2) != 1:
        raise ValueError(f"q_cache_SKD has strides {q_cache_SKD.stride()}; its last dimension must be contiguous")
    if x_TKD.numel() == 0:
        return
    x_TKD = x_TKD if x_TKD.stride(2) == 1 else x_TKD.contiguous()
    num_tokens, num_heads, head_dim = x_TKD.shape
    block_d = power_of_two(head_dim)
    chosen = config(block_d, num_heads)
    _quantise_kernel[(num_tokens * triton.cdiv(num_heads, chosen.blocks["BLOCK_K"]),)](
        x_TKD, q_cache_SKD, scale_cache_SK.view(torch.int16), slot_mapping_T, num_heads,
        *x_TKD.stride()[:2], *q_cache_SKD.stride()[:2], *scale_cache_SK.stride(),
        MAPPED=slot_mapping_T is not None, D=head_dim, BLOCK_D=block_d, **chosen.launch_options(),
    )  # fmt: skip


STRIDES: Final = ("x_stride_t", "x_stride_k", "q_stride_s", "q_stride_k")


def specimens() -> list[Specimen]:
    """8 kv heads into pages, both head dims."""
    signature: dict[str, Any] = {
        "x": "*bf16",
        "q": "*i8",
        "scale_bits": "*i16",
        "slots": "*i64",
        **dict.fromkeys(("num_heads", *STRIDES, "scale_stride_s", "scale_stride_k"), "i32"),
    }

    def specimen(arch: Arch, head_dim: int) -> Specimen:
        return Specimen(
            kernel=_quantise_kernel,
            name="quantise_kv",
            arch=arch,
            signature=signature,
            constants={"MAPPED": True, "D": head_dim, "BLOCK_D": head_dim},
            config=config(head_dim, 8),
            aligned=frozenset(STRIDES),
            tensor_cores=False,
        )

    return [specimen(arch, head_dim) for arch in ARCHS for head_dim in (64, 128)]
