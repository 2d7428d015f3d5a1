"""Vertical-slash attention by the package minference, where it is installed (extra `gpu`) and there is a GPU.

Shapes: T tokens of a whole prompt, H query heads, K kv heads, D head dim, V verticals, X slashes.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from colm_kernels.checks import check_dims, check_dtype, check_one_device

logger = logging.getLogger(__name__)


@cache
def vertical_slash_sparse_attention() -> Callable[..., Any] | None:
    """The package's function of that name; None without a GPU, or where the package is missing or broken."""
    if not torch.cuda.is_available():
        return None
    try:
        import minference
    except ImportError as err:
        logger.info("minference.unavailable reason=%s", err)
        return None
    function: Callable[..., Any] = minference.vertical_slash_sparse_attention
    return function


def is_available() -> bool:
    """Whether `vertical_slash_attention` may be called."""
    return vertical_slash_sparse_attention() is not None


def vertical_slash_attention(
    q_THD: Tensor, k_KTD: Tensor, v_KTD: Tensor, verticals_HV: Tensor, slashes_HX: Tensor
) -> Tensor:
    """Attend every query of a whole prompt to some columns and some diagonals of the keys before it.

    minference knows neither a prefix nor kv heads nor the LSE: keys are repeated for every query head, and a recall
    audit is not possible. `sparse_prefill_attention` has all three.

    Args:
        q_THD: rotated queries, bf16 or fp16; query head h reads kv head h // (H / K).
        k_KTD: rotated keys of the same tokens.
        v_KTD: values, same layout.
        verticals_HV: int32 positions of keys that every later query of the head attends to, in any order.
        slashes_HX: int32 distances from a query to the keys it attends to, in any order; 0 in every head. Blocks of
            64 keys are attended to whole, so a query sees more than is asked for, never less.

    Returns:
        out_THD in q's dtype.

    Raises:
        ValueError: shapes, dtypes or slashes that do not fit; without distance 0 the package reads out of bounds.
    """
    check_dims("q_THD", q_THD, None, None, None)
    num_tokens, num_heads, head_dim = q_THD.shape
    check_dims("k_KTD", k_KTD, None, num_tokens, head_dim)
    check_dims("v_KTD", v_KTD, *k_KTD.shape)
    check_dims("verticals_HV", verticals_HV, num_heads, None)
    check_dims("slashes_HX", slashes_HX, num_heads, None)
    for name, tensor in (("q_THD", q_THD), ("k_KTD", k_KTD), ("v_KTD", v_KTD)):
        check_dtype(name, tensor, torch.bfloat16, torch.float16)
    for name, tensor in (("verticals_HV", verticals_HV), ("slashes_HX", slashes_HX)):
        check_dtype(name, tensor, torch.int32)
    check_one_device(q_THD=q_THD, k_KTD=k_KTD, v_KTD=v_KTD, verticals_HV=verticals_HV, slashes_HX=slashes_HX)
    if not bool((slashes_HX == 0).any(dim=1).all()):
        raise ValueError("slashes_HX lacks distance 0 in a head; every query must see itself")
    function = vertical_slash_sparse_attention()
    assert function is not None
    group = num_heads // len(k_KTD)
    out_1HTD: Tensor = function(
        q_THD.transpose(0, 1).unsqueeze(0),
        k_KTD.repeat_interleave(group, dim=0).unsqueeze(0),
        v_KTD.repeat_interleave(group, dim=0).unsqueeze(0),
        verticals_HV.unsqueeze(0),
        slashes_HX.unsqueeze(0),
    )
    return out_1HTD[0].transpose(0, 1)
