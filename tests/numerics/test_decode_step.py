"""A decode step in one call of the library, against the model's own modules over the same pages.

Shapes: T tokens, V vocabulary, L layers, B pages, P tokens of a page, K kv heads, D head dim, M pages of a row.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from colm_kernels import native
from colm_kernels.decode_attention import MAX_QUERY_TOKENS
from colm_kernels.decode_step import DecodeStep, StepRows, StepTable
from colm_kernels.few_rows_linear import MAX_ROWS, MAX_ROWS_OF_PAIRS
from colm_kernels.native import BadTable, Variant, use_variant
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colm.checkpoint import Checkpoint
from colm.kv import KvFormat
from colm.model.one_call import all_gains, step_layers
from colm.model.weights import WeightLayout
from colm.placement import CPU
from decode_node.engine import DecodeEngine
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from decode_node.plan import PlanRow, StepPlan
from decode_node.settings import KvCacheDtype
from tests.library import VARIANTS, needs_library
from tests.tiny import tiny_checkpoint, tiny_config

pytestmark = pytest.mark.kernels

DTYPES = (torch.bfloat16, torch.float32)
PAGE_TOKENS, NUM_PAGES = 4, 96
MODELS = {
    "three chains": {},
    "biases": {"bias": True},
    "one kv head": {"chains": (8, 4, 2), "num_kv_heads": 1},
    "one chain": {"chains": (4,)},
    "widths of no vector": {"dim": 8 * 20, "hidden_dim": 8 * 27},
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def checkpoint(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "model", tiny_config(**request.param))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def whole_groups(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Whose inputs are multiples of 32, as quantised weights need them."""
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "groups", tiny_config(hidden_dim=8 * 32))


def store_of(checkpoint: Checkpoint, dtype: torch.dtype, cache_dtype: KvCacheDtype = "model") -> KvStore:
    """Pages of noise, the same for every call."""
    store = KvStore(KvLayout(KvFormat.of(checkpoint.config, dtype), PAGE_TOKENS, cache_dtype), NUM_PAGES)
    generator = torch.Generator().manual_seed(1)
    for pages in (store.k_pages_LBPKD, store.v_pages_LBPKD):
        spread = 40 if cache_dtype == "int8" else 1
        pages.copy_((spread * torch.randn(pages.shape, generator=generator)).clamp(-127, 127))
    for scales in (store.k_scales_LBPK, store.v_scales_LBPK):
        if scales is not None:
            scales.copy_(torch.rand(scales.shape, generator=generator) / 40)
    return store


def step_of(checkpoint: Checkpoint, store: KvStore, dtype: torch.dtype) -> DecodeStep:
    model, config = checkpoint.load(dtype=dtype), checkpoint.config
    layers = step_layers(model, CPU)
    assert layers is not None
    pages = store.k_pages_LBPKD, store.v_pages_LBPKD, store.k_scales_LBPK, store.v_scales_LBPK
    return DecodeStep(layers, all_gains(model.final_norm), config.chains, *pages, eps=config.norm_eps)


@st.composite
def plans(draw: st.DrawFn, num_chains: int) -> StepPlan:
    """Rows of mixed scales, 1 to 16 tokens each, over pages in any order."""
    num_rows = draw(st.integers(1, 4))
    scales = sorted((draw(st.integers(1, num_chains)) for _ in range(num_rows)), reverse=True)
    free = draw(st.permutations(range(NUM_PAGES)))
    rows = []
    for scale in scales:
        token_ids = tuple(draw(st.lists(st.integers(0, 319), min_size=1, max_size=MAX_QUERY_TOKENS)))
        position = draw(st.integers(0, 5 * PAGE_TOKENS))
        num_pages = -(-(position + len(token_ids)) // PAGE_TOKENS)
        table_M, free = np.array(free[:num_pages], dtype=np.int32), free[num_pages:]
        rows.append(PlanRow(token_ids, position, scale, table_M, draw(st.integers(0, len(token_ids)))))
    return StepPlan(tuple(rows))


def outcome(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    cache_dtype: KvCacheDtype,
    plan: StepPlan,
    *,
    in_one_call: bool,
    weights: WeightLayout | None = None,
) -> Sequence[Tensor]:
    """The logits, and all pages after the step."""
    store = store_of(checkpoint, dtype, cache_dtype)
    logits_QV = DecodeEngine(checkpoint, store, in_one_call=in_one_call, weights=weights).step(plan)
    scales = [each for each in (store.k_scales_LBPK, store.v_scales_LBPK) if each is not None]
    return logits_QV, store.k_pages_LBPKD, store.v_pages_LBPKD, *scales


@needs_library
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_one_call_gives_the_bits_of_the_models_own_modules(
    checkpoint: Checkpoint, dtype: torch.dtype, variant: Variant, data: st.DataObject
) -> None:
    plan, cache_dtype = data.draw(plans(checkpoint.config.num_chains)), data.draw(st.sampled_from(("model", "int8")))
    with use_variant(variant):
        ours = outcome(checkpoint, dtype, cache_dtype, plan, in_one_call=True)
        modules = outcome(checkpoint, dtype, cache_dtype, plan, in_one_call=False)
    assert modules[0].isfinite().all()
    for one_call, one_by_one in zip(ours, modules, strict=True):
        assert torch.equal(one_call, one_by_one)


@needs_library
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_one_call_gives_the_bits_of_the_modules_with_quantised_weights_too(
    whole_groups: Checkpoint, dtype: torch.dtype, variant: Variant, data: st.DataObject
) -> None:
    plan = data.draw(plans(whole_groups.config.num_chains))
    weights = WeightLayout(
        dtype=dtype,
        quantisation=data.draw(st.sampled_from(("int8", "q4"))),
        quantise_kv_projections=data.draw(st.booleans()),
    )
    with use_variant(variant):
        ours = outcome(whole_groups, dtype, "model", plan, in_one_call=True, weights=weights)
        modules = outcome(whole_groups, dtype, "model", plan, in_one_call=False, weights=weights)
    assert modules[0].isfinite().all()
    for one_call, one_by_one in zip(ours, modules, strict=True):
        assert torch.equal(one_call, one_by_one)


@needs_library
def test_steps_that_the_library_takes_run_in_one_call(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = list[Variant]()
    run = DecodeStep.run

    def noted(step: DecodeStep, x_TD: Tensor, rows: StepRows, variant: Variant) -> Tensor:
        runs.append(variant)
        return run(step, x_TD, rows, variant)

    monkeypatch.setattr(DecodeStep, "run", noted)
    engine = DecodeEngine(tiny, store_of(tiny, torch.float32))
    tables = np.arange(NUM_PAGES, dtype=np.int32).reshape(-1, 4)
    row = [PlanRow((1,) * 16, 0, 3, table_M) for table_M in tables]
    engine.step(StepPlan((row[0],)))
    assert runs == [native.default_variant(torch.float32)]
    engine.step(StepPlan((*row[:1], PlanRow((1,), 0, 1, tables[1]))))
    assert len(runs) == 2, f"weights in panels take {MAX_ROWS + 1} tokens too"


@needs_library
@pytest.mark.parametrize("variant", VARIANTS)
def test_how_many_tokens_one_call_takes_is_what_linear_takes(tiny: Checkpoint, variant: Variant) -> None:
    step = step_of(tiny, store_of(tiny, torch.bfloat16), torch.bfloat16)
    most = MAX_ROWS_OF_PAIRS if variant == "avx512_bf16" else MAX_ROWS
    with use_variant(variant):
        assert [step.variant_for(num_tokens) for num_tokens in (0, 1, most, most + 1)] == [
            "torch", variant, variant, "torch",
        ]  # fmt: skip


def test_some_weights_in_panels_beside_others_by_rows_are_refused(tiny: Checkpoint) -> None:
    layers = step_layers(tiny.load(dtype=torch.float32), CPU)
    mixed = step_layers(tiny.load_in_panels(WeightLayout(dtype=torch.float32)), CPU)
    assert layers is not None
    assert mixed is not None
    with pytest.raises(ValueError, match="some weights are in panels and others are not; lay out all or none"):
        StepTable([layers[0], mixed[1]], [], tiny.config.chains)


def test_a_feed_forward_without_a_gate_runs_in_its_modules(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "gelu", tiny_config(activation="gelu"))
    assert step_layers(checkpoint.load(), CPU) is None


def test_weights_of_another_dtype_than_the_pages_are_refused(tiny: Checkpoint) -> None:
    with pytest.raises(ValueError, match=r"k_pages_LBPKE is torch\.bfloat16, expected contiguous torch\.float32"):
        step_of(tiny, store_of(tiny, torch.bfloat16), torch.float32)


def test_pages_of_another_dtype_than_int8_beside_scales_are_refused(tiny: Checkpoint) -> None:
    store = store_of(tiny, torch.float32, "int8")
    store.v_pages_LBPKD = store.v_pages_LBPKD.float()
    with pytest.raises(ValueError, match=r"v_pages_LBPKE is torch\.float32, expected contiguous torch\.int8"):
        step_of(tiny, store, torch.float32)


def one_row(checkpoint: Checkpoint, *, chain_rows: Sequence[int], slot: int) -> StepRows:
    return StepRows(
        chain_rows=chain_rows,
        cos_TE=torch.ones(1, checkpoint.config.head_dim),
        sin_TE=torch.zeros(1, checkpoint.config.head_dim),
        slot_mapping_T=torch.tensor([slot]),
        block_table_RM=torch.zeros(1, 1, dtype=torch.int32),
        context_lens_R=torch.ones(1, dtype=torch.int32),
        cu_seqlens_q_R1=torch.tensor([0, 1], dtype=torch.int32),
    )


@pytest.mark.parametrize("num_active", [0, 4])
def test_rows_of_more_chains_than_the_weights_have_are_refused(tiny: Checkpoint, num_active: int) -> None:
    """Bug: the library read pointers behind its tables, and the process crashed."""
    step = step_of(tiny, store_of(tiny, torch.float32), torch.float32)
    rows = one_row(tiny, chain_rows=[1] * num_active, slot=0)
    with pytest.raises(ValueError, match=f"chain_rows has {num_active} chains, and the step has weights of 1 to 3"):
        step.run(torch.ones(1, tiny.config.dim), rows, step.variant_for(1))


@needs_library
@pytest.mark.parametrize("cache_dtype", ["model", "int8"])
@pytest.mark.parametrize("slot", [-1, NUM_PAGES * PAGE_TOKENS])
def test_a_slot_outside_the_pages_is_refused(tiny: Checkpoint, slot: int, cache_dtype: KvCacheDtype) -> None:
    store = store_of(tiny, torch.float32, cache_dtype)
    step = step_of(tiny, store, torch.float32)
    rows = one_row(tiny, chain_rows=[1, 1, 1], slot=slot)
    before = store.k_pages_LBPKD.clone()
    with torch.inference_mode(), pytest.raises(BadTable):
        step.run(torch.ones(1, tiny.config.dim), rows, step.variant_for(1))
    assert torch.equal(store.k_pages_LBPKD, before)
