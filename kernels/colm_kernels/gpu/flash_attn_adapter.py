"""Dense prefill attention by the package flash-attn, if it is installed (extra `gpu`) and there is a GPU.

Shapes: T queries of the tile, S keys (prefix and tile, S >= T), H query heads, K kv heads, D head dim.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

MIN_VERSION: Final = (2, 1)
"""From this version on, the causal mask is aligned at the bottom right, as ours is."""
MAX_HEAD_DIM: Final = 256


def why_not(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why flash-attn cannot attend for queries of a dtype and head dim here; None if it can."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes float16 and bfloat16, not {dtype}"
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"flash-attn takes head dims that are multiples of 8 up to {MAX_HEAD_DIM}, not {head_dim}"
    found = _flash_attn_func()
    return found if isinstance(found, str) else None


@cache
def _flash_attn_func() -> Callable[..., Any] | str:
    """The package's function of that name, or why there is none."""
    if not torch.cuda.is_available():
        return "flash-attn needs a GPU, and PyTorch finds none"
    try:
        import flash_attn
    except ImportError as err:
        return f"flash-attn cannot be imported: {err}"
    if tuple(int(part) for part in flash_attn.__version__.split(".")[:2]) < MIN_VERSION:
        return f"flash-attn {flash_attn.__version__} is older than {'.'.join(map(str, MIN_VERSION))}"
    function: Callable[..., Any] = flash_attn.flash_attn_func
    return function


def prefill_attention(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor) -> tuple[Tensor, Tensor]:
    """`prefill_attention` of checked arguments, for which `why_not` is None."""
    function = _flash_attn_func()
    assert not isinstance(function, str)
    # A batch of one, tokens before heads: views, which the package reads in place where D is contiguous.
    out_1THD, lse_1HT, _ = function(
        q_THD.unsqueeze(0),
        k_KSD.transpose(0, 1).unsqueeze(0),
        v_KSD.transpose(0, 1).unsqueeze(0),
        causal=True,
        return_attn_probs=True,
    )
    return out_1THD[0], lse_1HT[0].T
