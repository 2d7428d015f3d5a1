"""Rotary position embedding in Triton, of queries in place and of keys into the cache; see colm_kernels/rotary.py.

Shapes: T tokens, N heads, K kv heads, D head dim, S rows of the cache, J planes (D / 2).
"""

from typing import Any, Final

import triton
import triton.language as tl
from torch import Tensor

from colm_kernels.gpu.device import on_its_device
from colm_kernels.gpu.specimen import ARCHS, Arch, Config, Specimen, power_of_two


@triton.jit
def _rotary_kernel(
    x, out, v, v_out, cos, sin, slots, num_heads,
    x_stride_t, x_stride_n, out_stride_s, out_stride_n, v_stride_t, v_stride_n, v_out_stride_s, v_out_stride_n,
    cos_stride_t, sin_stride_t,
    WITH_VALUES: tl.constexpr, MAPPED: tl.constexpr, HALF: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(num_heads, BLOCK_N)
    token = (tl.program_id(0) // num_blocks).to(tl.int64)
    heads_N = tl.program_id(0) % num_blocks * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    planes_J = tl.arange(0, BLOCK_J)
    is_plane_J = planes_J < HALF
    is_inside_NJ = (heads_N < num_heads)[:, None] & is_plane_J[None, :]
    row = tl.load(slots + token) if MAPPED else token
    cos_J = tl.load(cos + token * cos_stride_t + planes_J, mask=is_plane_J, other=0.0)[None, :]
    sin_J = tl.load(sin + token * sin_stride_t + planes_J, mask=is_plane_J, other=0.0)[None, :]
    x_NJ = x + token * x_stride_t + heads_N[:, None] * x_stride_n + planes_J[None, :]
    out_NJ = out + row * out_stride_s + heads_N[:, None] * out_stride_n + planes_J[None, :]
    first_NJ = tl.load(x_NJ, mask=is_inside_NJ, other=0.0).to(tl.float32)
    second_NJ = tl.load(x_NJ + HALF, mask=is_inside_NJ, other=0.0).to(tl.float32)
    tl.store(out_NJ, (first_NJ * cos_J - second_NJ * sin_J).to(out.dtype.element_ty), mask=is_inside_NJ)
    tl.store(out_NJ + HALF, (second_NJ * cos_J + first_NJ * sin_J).to(out.dtype.element_ty), mask=is_inside_NJ)
    if WITH_VALUES:
        v_NJ = v + token * v_stride_t + heads_N[:, None] * v_stride_n + planes_J[None, :]
        v_out_NJ = v_out + row * v_out_stride_s + heads_N[:, None] * v_out_stride_n + planes_J[None, :]
        tl.store(v_out_NJ, tl.load(v_NJ, mask=is_inside_NJ), mask=is_inside_NJ)
        tl.store(v_out_NJ + HALF, tl.load(v_NJ + HALF, mask=is_inside_NJ), mask=is_inside_NJ)


def config(block_j: int, num_heads: int) -> Config:
    """Heads of a program: up to 1024 elements of either half; 8 a thread are one load of 16 bytes in bf16."""
    block_n = max(min(power_of_two(num_heads), 1024 // block_j), 1)
    return Config(blocks={"BLOCK_N": block_n}, num_warps=max(block_n * block_j // 256, 1), num_stages=1)


def rotate_(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """`rotate_` of checked arguments, in one launch."""
    if x_TND.stride(2) != 1:
        return x_TND.copy_(rotate_(x_TND.contiguous(), cos_TD, sin_TD))
    _launch(x_TND, None, cos_TD, sin_TD, x_TND, None, None)
    return x_TND


def write_kv(
    k_TKD: Tensor,
    v_TKD: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    k_cache_SKD: Tensor,
    v_cache_SKD: Tensor,
    slot_mapping_T: Tensor | None = None,
) -> None:
    """`write_kv` of checked arguments, in one launch; slots are not checked.

    Reading the slots on the host would wait for the device.

    Raises:
        ValueError: a cache's last dimension is not contiguous.
    """
    for name, cache in (("k_cache_SKD", k_cache_SKD), ("v_cache_SKD", v_cache_SKD)):
        if cache.stride(2) != 1:
            raise ValueError(f"{name} has strides {cache.stride()}; its last dimension must be contiguous")
    k_TKD, v_TKD = (tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (k_TKD, v_TKD))
    _launch(k_TKD, v_TKD, cos_TD, sin_TD, k_cache_SKD, v_cache_SKD, slot_mapping_T)


@on_its_device
def _launch(
    x_TND: Tensor,
    v_TND: Tensor | None,
    cos_TD: Tensor,
    sin_TD: Tensor,
    out_SND: Tensor,
    v_out_SND: Tensor | None,
    slots_T: Tensor | None,
) -> None:
    if x_TND.numel() == 0:
        return
    num_tokens, num_heads, head_dim = x_TND.shape
    cos_TD, sin_TD = (table if table.stride(1) == 1 else table.contiguous() for table in (cos_TD, sin_TD))
    block_j = power_of_two(head_dim // 2)
    chosen = config(block_j, num_heads)
    strides = [
        stride
        for tensor in (x_TND, out_SND, v_TND, v_out_SND)
        for stride in ((0, 0) if tensor is None else tensor.stride()[:2])
    ]
    _rotary_kernel[(num_tokens * triton.cdiv(num_heads, chosen.blocks["BLOCK_N"]),)](
        x_TND, out_SND, v_TND, v_out_SND, cos_TD, sin_TD, slots_T, num_heads,
        *strides, cos_TD.stride(0), sin_TD.stride(0),
        WITH_VALUES=v_TND is not None, MAPPED=slots_T is not None, HALF=head_dim // 2, BLOCK_J=block_j,
        **chosen.launch_options(),
    )  # fmt: skip


STRIDES: Final = (
    "x_stride_t", "x_stride_n", "out_stride_s", "out_stride_n", "v_stride_t", "v_stride_n",
    "v_out_stride_s", "v_out_stride_n", "cos_stride_t", "sin_stride_t",
)  # fmt: skip


def specimens() -> list[Specimen]:
    """8 kv heads into pages, both head dims."""
    signature: dict[str, Any] = {
        **dict.fromkeys(("x", "out", "v", "v_out"), "*bf16"),
        **dict.fromkeys(("cos", "sin"), "*fp32"),
        "slots": "*i64",
        **dict.fromkeys(("num_heads", *STRIDES), "i32"),
    }

    def specimen(arch: Arch, head_dim: int) -> Specimen:
        return Specimen(
            kernel=_rotary_kernel,
            name="write_kv",
            arch=arch,
            signature=signature,
            constants={"WITH_VALUES": True, "MAPPED": True, "HALF": head_dim // 2, "BLOCK_J": head_dim // 2},
            config=config(head_dim // 2, 8),
            aligned=frozenset(STRIDES),
            tensor_cores=False,
        )

    return [specimen(arch, head_dim) for arch in ARCHS for head_dim in (64, 128)]
