"""Dense prefill attention in Triton; see colm_kernels/prefill_attention.py.

Shapes: T queries of the tile, S keys (prefix and tile, S >= T), H query heads, K kv heads, D head dim, M rows of a
program, N keys of a block.

A row is a query token and one of its kv head's query heads, so a program's keys serve the whole group, and a short tile
fills its rows. The keys that every row of a program sees need no mask; the blocks around the diagonal follow.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from colm_kernels.gpu.device import arch_of, on_its_device
from colm_kernels.gpu.softmax import LN_2, LOG2_E, attend
from colm_kernels.gpu.specimen import ARCHS, Arch, Config, Specimen, power_of_two

MAX_HEAD_DIM: Final = 128


@triton.jit
def _prefill_kernel(
    q, k, v, out, lse, num_queries, num_keys, num_kv_heads, group, scale_log2,
    q_stride_t, q_stride_h, k_stride_k, k_stride_s, v_stride_k, v_stride_s,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The last rows see the most keys. They start first, so that short programs fill the gaps at the end.
    tile = tl.cdiv(num_queries * group, BLOCK_M) - 1 - tl.program_id(0) // num_kv_heads
    kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    rows_M = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens_M = rows_M // group
    heads_M = kv_head * group + rows_M % group
    dims_D = tl.arange(0, BLOCK_D)
    is_row_M = tokens_M < num_queries
    is_dim_D = dims_D < D
    q_MD = tl.load(
        q + tokens_M[:, None] * q_stride_t + heads_M[:, None] * q_stride_h + dims_D[None, :],
        mask=is_row_M[:, None] & is_dim_D[None, :],
        other=0.0,
    )

    prefix = num_keys - num_queries
    first_token = tile * BLOCK_M // group
    last_token = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // group, num_queries - 1)
    seen_by_all = (prefix + first_token + 1) // BLOCK_N * BLOCK_N
    keys_N = tl.arange(0, BLOCK_N)
    k_ND = k + kv_head * k_stride_k + keys_N[:, None].to(tl.int64) * k_stride_s + dims_D[None, :]
    v_ND = v + kv_head * v_stride_k + keys_N[:, None].to(tl.int64) * v_stride_s + dims_D[None, :]
    out_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    maximum_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_M = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, seen_by_all, BLOCK_N):
        at = tl.cast(start, tl.int64)
        keys_ND = _load(k_ND + at * k_stride_s, is_dim_D[None, :], D == BLOCK_D)
        values_ND = _load(v_ND + at * v_stride_s, is_dim_D[None, :], D == BLOCK_D)
        out_MD, maximum_M, total_M = attend(
            q_MD, keys_ND, values_ND, None, None, None, scale_log2, out_MD, maximum_M, total_M, False, False
        )
    for start in tl.range(seen_by_all, prefix + last_token + 1, BLOCK_N):
        at = tl.cast(start, tl.int64)
        is_key_ND = (start + keys_N[:, None] < num_keys) & is_dim_D[None, :]
        keys_ND = _load(k_ND + at * k_stride_s, is_key_ND, False)
        values_ND = _load(v_ND + at * v_stride_s, is_key_ND, False)
        is_seen_MN = start + keys_N[None, :] <= prefix + tokens_M[:, None]
        out_MD, maximum_M, total_M = attend(
            q_MD, keys_ND, values_ND, None, None, is_seen_MN, scale_log2, out_MD, maximum_M, total_M, True, False
        )

    at_M = tokens_M * (num_kv_heads * group) + heads_M
    tl.store(
        out + at_M[:, None] * D + dims_D[None, :],
        (out_MD / total_M[:, None]).to(out.dtype.element_ty),
        mask=is_row_M[:, None] & is_dim_D[None, :],
    )
    tl.store(lse + at_M, (maximum_M + tl.log2(total_M)) * LN_2, mask=is_row_M)


@triton.jit
def _load(pointers, mask, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


def config(arch: Arch, dtype: torch.dtype, block_d: int) -> Config:
    """Rows and keys of a program: the largest powers of two that the compiler fits without spilling.

    Registers are the limit. They hold a row's output, scores and weights, and on sm_80 its query as well.
    """
    if dtype == torch.float32:
        return Config(blocks={"BLOCK_M": 32, "BLOCK_N": 16}, num_warps=8, num_stages=2)
    block_n = (64 if arch == 80 else 128) * 64 // max(block_d, 64)
    return Config(blocks={"BLOCK_M": 128, "BLOCK_N": block_n}, num_warps=8, num_stages=3)


def block_dim(head_dim: int) -> int:
    """The side of a tile that holds a head dim: the smallest power of two, at least 16.

    Raises:
        ValueError: the head dim is over `MAX_HEAD_DIM`.
    """
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"q_THD has head dim {head_dim}, more than the {MAX_HEAD_DIM} that a program's registers hold")
    return max(16, power_of_two(head_dim))


@on_its_device
def prefill_attention(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor) -> tuple[Tensor, Tensor]:
    """`prefill_attention` of checked arguments, in one launch.

    Raises:
        ValueError: the head dim is over `MAX_HEAD_DIM`.
    """
    num_queries, num_heads, head_dim = q_THD.shape
    num_kv_heads, num_keys, _ = k_KSD.shape
    block_d = block_dim(head_dim)
    if q_THD.stride(2) != 1:
        q_THD = q_THD.contiguous()
    out_THD = q_THD.new_empty(q_THD.shape)
    lse_TH = q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)
    if q_THD.numel() == 0:
        return out_THD, lse_TH
    group = num_heads // num_kv_heads
    chosen = config(arch_of(q_THD), q_THD.dtype, block_d)
    num_tiles = triton.cdiv(num_queries * group, chosen.blocks["BLOCK_M"])
    _prefill_kernel[(num_tiles * num_kv_heads,)](
        q_THD, k_KSD, v_KSD, out_THD, lse_TH, num_queries, num_keys, num_kv_heads, group, head_dim**-0.5 * LOG2_E,
        q_THD.stride(0), q_THD.stride(1), k_KSD.stride(0), k_KSD.stride(1), v_KSD.stride(0), v_KSD.stride(1),
        D=head_dim, BLOCK_D=block_d, **chosen.launch_options(),
    )  # fmt: skip
    return out_THD, lse_TH


STRIDES: Final = ("q_stride_t", "q_stride_h", "k_stride_k", "k_stride_s", "v_stride_k", "v_stride_s")


def specimens() -> list[Specimen]:
    """Both head dims of the models served, in bf16; the wider in fp32, which no tensor core multiplies exactly."""
    signature: dict[str, Any] = {
        "lse": "*fp32",
        **dict.fromkeys(("num_queries", "num_keys", "num_kv_heads", "group", *STRIDES), "i32"),
        "scale_log2": "fp32",
    }
    return [
        Specimen(
            kernel=_prefill_kernel,
            name=f"prefill_attention ({name})",
            arch=arch,
            signature={**signature, **dict.fromkeys(("q", "k", "v", "out"), f"*{name}")},
            constants={"D": head_dim, "BLOCK_D": head_dim},
            config=config(arch, dtype, head_dim),
            aligned=frozenset(STRIDES),
            tensor_cores=dtype != torch.float32,
        )
        for arch in ARCHS
        for head_dim, name, dtype in (
            (64, "bf16", torch.bfloat16),
            (128, "bf16", torch.bfloat16),
            (128, "fp32", torch.float32),
        )
    ]
