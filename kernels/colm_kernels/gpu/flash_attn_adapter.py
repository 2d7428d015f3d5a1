"""Dense prefill attention by the package flash-attn, where it is installed (extra `gpu`) and there is a GPU.

Shapes: T queries of the tile, S keys (prefix and tile, S >= T), H query heads, K kv heads, D head dim.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MIN_VERSION: Final = (2, 1)
"""Since then the causal mask is aligned at the bottom right, as ours is."""
MAX_HEAD_DIM: Final = 256


def takes(q_THD: Tensor) -> bool:
    """Whether flash-attn is there and computes attention of such queries."""
    head_dim = q_THD.shape[2]
    return (
        q_THD.dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= MAX_HEAD_DIM
        and flash_attn_func() is not None
    )


@cache
def flash_attn_func() -> Callable[..., Any] | None:
    """The package's function of that name; None without a GPU, or where the package is missing, broken or too old."""
    if not torch.cuda.is_available():
        return None
    try:
        import flash_attn
    except ImportError as err:
        logger.info("flash_attn.unavailable reason=%s", err)
        return None
    if tuple(int(part) for part in flash_attn.__version__.split(".")[:2]) < MIN_VERSION:
        logger.warning("flash_attn.too_old version=%s min_version=%d.%d", flash_attn.__version__, *MIN_VERSION)
        return None
    function: Callable[..., Any] = flash_attn.flash_attn_func
    return function


def prefill_attention(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor) -> tuple[Tensor, Tensor]:
    """`prefill_attention` of checked arguments that `takes` said yes to."""
    function = flash_attn_func()
    assert function is not None
    # A batch of one, tokens before heads: views, which the package reads in place where D is contiguous.
    out_1THD, lse_1HT, _ = function(
        q_THD.unsqueeze(0),
        k_KSD.transpose(0, 1).unsqueeze(0),
        v_KSD.transpose(0, 1).unsqueeze(0),
        causal=True,
        return_attn_probs=True,
    )
    return out_1THD[0], lse_1HT[0].T
