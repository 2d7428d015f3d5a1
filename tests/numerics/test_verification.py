"""A step that verifies drafts has, to the bit, the logits, keys and values of the single steps that it stands for."""

import numpy as np
import pytest
import torch
from colm_kernels import tolerance
from colm_kernels.decode_attention import MAX_QUERY_TOKENS
from colm_kernels.quantised import Quantisation
from torch import Tensor

from decode_node.plan import MAX_DRAFT_TOKENS, PlanRow, StepPlan
from decode_node.settings import KvCacheDtype
from tests.numerics.test_drafting import HAS_OWN_BITS, engine_of, model


def beside_it(num_tokens: int) -> tuple[PlanRow, ...]:
    """Other answers' rows of so many tokens, at scale 2, each in pages of its own."""
    starts = range(0, num_tokens, MAX_QUERY_TOKENS)
    tables = [np.arange(40 + 2 * place, 42 + 2 * place, dtype=np.int32) for place in range(len(starts))]
    return tuple(
        PlanRow((7,) * min(MAX_QUERY_TOKENS, num_tokens - start), 0, 2, table_M)
        for start, table_M in zip(starts, tables, strict=True)
    )


def assert_same(ours: Tensor, one_by_one: Tensor, over: KvCacheDtype = "model") -> None:
    """To the bit where rows have their own; else within the budget of layers, of bf16 over pages of int8.

    There, a number between two whole ones may be rounded to either.
    """
    if HAS_OWN_BITS:
        assert torch.equal(ours, one_by_one)
    elif ours.dtype == torch.int8:
        assert (ours.int() - one_by_one.int()).abs().max() <= 1
    else:
        config = model("random").config
        dtype = torch.bfloat16 if over == "int8" else ours.dtype
        exact = one_by_one.double()
        tolerance.layers(exact, dtype, num_layers=config.num_layers, width=config.dim).check(ours.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("num_drafts", "cache_dtype", "quantisation"),
    [
        *((num_drafts, "model", None) for num_drafts in (1, 3, 7, MAX_DRAFT_TOKENS)),
        (7, "int8", None),
        (7, "model", "q4"),
        (MAX_DRAFT_TOKENS, "model", "int8"),
    ],
)
def test_a_verification_has_the_bits_of_single_steps(
    dtype: torch.dtype, num_drafts: int, cache_dtype: KvCacheDtype, quantisation: Quantisation | None
) -> None:
    """Logits, keys and values of k + 1 rows are those of k + 1 steps, over what chain 1's drafts have written.

    Alone, and beside as many tokens of others as keep the bits: 64 in all, or 16 where weights lie by rows.
    """
    engine, store = engine_of("random", dtype, cache_dtype, quantisation)
    text = np.random.default_rng(1).integers(3, 300, 10 + num_drafts + 1).tolist()
    singly, together = (np.arange(start, start + 8, dtype=np.int32) for start in (0, 32))
    for table_M in (singly, together):
        engine.step(StepPlan((PlanRow(tuple(text[:10]), 0, 1, table_M, num_logits=0),)))
    for position in range(10, len(text) - 1):  # the drafts
        engine.step(StepPlan((PlanRow((text[position],), position, 1, together),)))
    alone_QV = torch.cat([engine.step(StepPlan((PlanRow((text[at],), at, 3, singly),))) for at in range(10, len(text))])
    row = PlanRow(tuple(text[10:]), 10, 3, together, num_logits=num_drafts + 1)
    for beside in ((), beside_it(engine.max_exact_tokens - num_drafts - 1)):
        verified_QV = engine.step(StepPlan((row, *beside)))[: num_drafts + 1]
        assert_same(verified_QV, alone_QV, over=cache_dtype)
    for pages_LBPKD in (store.k_pages_LBPKD, store.v_pages_LBPKD, store.k_scales_LBPK, store.v_scales_LBPK):
        if pages_LBPKD is None:
            continue
        ours, one_by_one = (
            pages_LBPKD[:, torch.from_numpy(table_M).long()].flatten(1, 2)[:, : len(text)]
            for table_M in (together, singly)
        )
        assert_same(ours, one_by_one)
