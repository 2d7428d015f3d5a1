"""One step of the online softmax, which all attention kernels share.

Shapes: M rows of queries, N keys of a block, D head dim.
"""

from typing import Final

import triton
import triton.language as tl

LOG2_E: Final = 1.4426950408889634
LN_2: Final = tl.constexpr(0.6931471805599453)


@triton.jit
def attend(q_MD, k_ND, v_ND, k_scales_N, v_scales_N, is_seen_MN, scale_log2, out_MD, maximum_M, total_M,
           MASKED: tl.constexpr, SCALED: tl.constexpr):  # fmt: skip
    """Update the output, maximum and total of each row's softmax by a block of keys, and return them.

    Powers are of two: a key weighs exp2(score * scale_log2 - maximum), a row's LSE is (maximum + log2(total)) * ln 2.
    k_scales_N and v_scales_N multiply int8 keys and values, one scale a key.
    """
    scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
    if SCALED:
        scores_MN = scores_MN * k_scales_N[None, :]
    if MASKED:
        scores_MN = tl.where(is_seen_MN, scores_MN, float("-inf"))
    # Scaled in fp32 after the dot product: scaled queries would be rounded once more.
    new_maximum_M = tl.maximum(maximum_M, tl.max(scores_MN, 1) * scale_log2)
    # A row that has seen no key has maximum -inf; the difference of two infinities would be NaN.
    shift_M = tl.where(new_maximum_M == float("-inf"), 0.0, new_maximum_M)
    weights_MN = tl.exp2(scores_MN * scale_log2 - shift_M[:, None])
    decay_M = tl.exp2(maximum_M - shift_M)
    total_M = total_M * decay_M + tl.sum(weights_MN, 1)
    if SCALED:
        weights_MN = weights_MN * v_scales_N[None, :]
    out_MD = tl.dot(weights_MN.to(v_ND.dtype), v_ND, out_MD * decay_M[:, None], input_precision="ieee")
    return out_MD, new_maximum_M, total_M
