"""A model whose weights lie in panels: which of them do, and what it costs to lay them out."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from colm_kernels import native
from colm_kernels.panels import Panels
from colm_kernels.quantised import Quantisation, QuantisedPanels, quantise
from torch import Tensor

from colm.checkpoint import Checkpoint
from colm.errors import ConfigError
from colm.kv import KvFormat
from colm.model import ChainTransformer
from colm.model.weights import WeightLayout, lay_out_in_panels
from decode_node.engine import DecodeEngine
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from decode_node.plan import PlanRow, StepPlan
from tests.tiny import tiny_checkpoint, tiny_config

MODELS: dict[str, dict[str, Any]] = {
    "head of its own": {},
    "tied": {"tie_embeddings": True},
    "biases": {"bias": True},
    "gelu": {"activation": "gelu"},
    "odd widths": {"dim": 8 * 20, "hidden_dim": 8 * 27, "vocab_size": 319},
}

OF_WHOLE_GROUPS: dict[str, Any] = {"hidden_dim": 8 * 32}
"""Quantised weights need inputs in multiples of 32."""


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Checkpoint:
    return tiny_checkpoint(tmp_path / "tiny", tiny_config(**request.param))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_a_step_multiplies_by_lies_in_panels_and_all_else_as_before(
    checkpoint: Checkpoint, dtype: torch.dtype
) -> None:
    model, expected = (
        checkpoint.load_in_panels(WeightLayout(dtype=dtype)),
        dict(checkpoint.load(dtype=dtype).named_parameters()),
    )
    panels = {
        f"{module_name}.{name}": weight
        for module_name, module in model.multiplied.items()
        for name, weight in zip(module.names, module.weights(len(module.names)), strict=True)
    }
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and (checkpoint.config.tie_embeddings or not name.startswith("embedding"))
        assert (name in panels) == is_matrix
        if is_matrix:
            weight = panels[name]
            assert isinstance(weight, Panels)
            assert torch.equal(weight.rows(), expected[name])
            assert parameter.is_meta, "the rows take memory as well"
        else:
            assert torch.equal(parameter, expected[name])


def test_embeddings_of_a_tied_table_are_looked_up_in_its_panels(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tied", tiny_config(tie_embeddings=True, vocab_size=319))
    tokens = torch.tensor([318, 0, 31, 32, 31])
    by_rows, in_panels = (
        checkpoint.load(dtype=torch.float32),
        checkpoint.load_in_panels(WeightLayout(dtype=torch.float32)),
    )
    for num_chains in (1, 2, 3):
        assert torch.equal(in_panels.embedding.embed(tokens, num_chains), by_rows.embedding.embed(tokens, num_chains))


@pytest.mark.parametrize("quantisation", [None, "q4"])
def test_a_tensor_of_the_file_is_let_go_of_before_the_next_is_read(
    tmp_path: Path, quantisation: Quantisation | None
) -> None:
    """Else a node would need its weights' memory twice while it loads them."""
    checkpoint = tiny_checkpoint(tmp_path / "tiny", tiny_config(**OF_WHOLE_GROUPS))
    with torch.device("meta"):
        model = ChainTransformer(checkpoint.config)
    stored, given = checkpoint.load().state_dict(), list[weakref.ref[Tensor]]()

    def weight_of(name: str) -> Tensor:
        assert all(earlier() is None for earlier in given), f"something is held while {name} is read"
        weight = stored[name].clone()
        given.append(weakref.ref(weight))
        return weight

    names = lay_out_in_panels(model.multiplied, weight_of, WeightLayout(dtype=torch.float32, quantisation=quantisation))
    assert len(names) == len(given) > checkpoint.config.num_layers


@pytest.mark.parametrize("of_kv", [False, True])
@pytest.mark.parametrize("quantisation", ["int8", "q4"])
def test_matrices_are_quantised_each_chain_apart_keys_and_values_only_if_asked_and_tables_in_int8(
    tmp_path: Path, quantisation: Quantisation, *, of_kv: bool
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", tiny_config(tie_embeddings=True, **OF_WHOLE_GROUPS))
    dtype = torch.bfloat16
    model = checkpoint.load_in_panels(
        WeightLayout(dtype=dtype, quantisation=quantisation, quantise_kv_projections=of_kv)
    )
    stored = checkpoint.load().state_dict()
    for module_name, module in model.multiplied.items():
        of_module = None if module_name.endswith((".wk", ".wv")) and not of_kv else quantisation
        for name, weight in zip(module.names, module.weights(len(module.names)), strict=True):
            tensor = stored[f"{module_name}.{name}"]
            if of_module is None:
                assert isinstance(weight, Panels)
                assert torch.equal(weight.rows(), tensor.to(dtype))
                continue
            assert isinstance(weight, QuantisedPanels)
            assert weight.quantisation == ("int8" if module_name == "embedding" else quantisation)
            # From what the file holds, not from what it is rounded to.
            assert torch.equal(weight.rows(), quantise(tensor, weight.quantisation).weight().to(dtype))


def test_a_step_reads_fewer_bytes_of_quantised_weights(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", tiny_config(**OF_WHOLE_GROUPS))
    store = KvStore(KvLayout(KvFormat.of(checkpoint.config, torch.bfloat16), 4), 4)

    def weight_bytes(quantisation: Quantisation | None) -> int:
        layout = WeightLayout(dtype=torch.bfloat16, quantisation=quantisation, quantise_kv_projections=True)
        return DecodeEngine(checkpoint, store, weights=layout).weight_bytes(3)

    stored, int8 = weight_bytes(None), weight_bytes("int8")
    assert int8 * 16 == stored * 8.5
    assert stored * 5 / 16 < weight_bytes("q4") < int8


def test_weights_that_cannot_be_quantised_are_refused_with_the_way_out(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "odd")
    with pytest.raises(ConfigError, match=r"weights='q4': tensor .*down.chain2' has 144 inputs.*leave the weights as"):
        checkpoint.load_in_panels(WeightLayout(dtype=torch.float32, quantisation="q4"))


def test_quantised_weights_are_refused_where_there_is_no_kernel_for_them(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    store = KvStore(KvLayout(KvFormat.of(checkpoint.config, torch.float32), 4), 4, torch.device("meta"))
    with pytest.raises(ConfigError, match=r"weights='int8' is for CPUs, and this node computes on meta"):
        DecodeEngine(checkpoint, store, weights=WeightLayout(dtype=torch.float32, quantisation="int8"))


@pytest.mark.parametrize("tied", [False, True])
def test_drafts_have_chain_1_alone_in_one_format_and_the_whole_models_embedding(tmp_path: Path, *, tied: bool) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", tiny_config(tie_embeddings=tied, **OF_WHOLE_GROUPS))
    layout = WeightLayout(dtype=torch.float32, quantisation="q4", only_drafts=True)
    model = checkpoint.load_in_panels(layout, 1)
    stored = checkpoint.load().state_dict()
    for module_name, module in model.multiplied.items():
        assert list(module.names) == ["chain1"]
        (weight,) = module.weights(1)
        assert isinstance(weight, QuantisedPanels)
        expected = quantise(stored[f"{module_name}.chain1"], "q4", fits=False)
        assert torch.equal(weight.rows(), expected.weight().float())
    assert model.embedding.get_parameter("chain1").is_meta
    assert torch.equal(model.final_norm.gains(1)[0], stored["final_norm.chain1"])


def test_a_step_of_drafts_alone_reads_quantised_weights_and_any_other_step_the_stored_ones(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", tiny_config(**OF_WHOLE_GROUPS))
    store = KvStore(KvLayout(KvFormat.of(checkpoint.config, torch.float32), 4), 4)
    engine, exact = DecodeEngine(checkpoint, store, draft_weights="q4"), DecodeEngine(checkpoint, store)
    table_M = np.arange(4, dtype=np.int32)
    draft, read = (PlanRow((7,), 0, 1, table_M, is_draft=is_draft) for is_draft in (True, False))
    drafted_V, read_V = (exact.step(StepPlan((row,)))[0] for row in (draft, read))
    assert torch.equal(drafted_V, read_V)
    assert torch.equal(engine.step(StepPlan((read,)))[0], read_V)
    if native.default_variant(torch.float32) == "torch":
        assert engine.draft_share == 1.0
        return
    assert engine.draft_share == 5 / 32
    assert not torch.equal(engine.step(StepPlan((draft,)))[0], read_V)
    beside_V = engine.step(StepPlan((PlanRow((9,), 4, 3, table_M), draft)))[1]
    assert torch.equal(beside_V, read_V), "an answer beside it has its own weights"


def test_drafts_use_chain_1s_own_weights_where_no_copy_can_be_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = tiny_checkpoint(tmp_path / "odd", tiny_config(**MODELS["odd widths"]))
    whole = tiny_checkpoint(tmp_path / "whole", tiny_config(**OF_WHOLE_GROUPS))

    def draft_share(checkpoint: Checkpoint, **options: Any) -> float:
        store = KvStore(KvLayout(KvFormat.of(checkpoint.config, torch.float32), 4), 4)
        return DecodeEngine(checkpoint, store, **options).draft_share

    assert draft_share(whole) == 1.0
    quantised = WeightLayout(dtype=torch.float32, quantisation="int8")
    assert draft_share(whole, draft_weights="q4", weights=quantised) == 1.0
    assert not caplog.messages
    assert draft_share(odd, draft_weights="q4") == 1.0
    if native.default_variant(torch.float32) != "torch":
        assert ["inputs, not a multiple of 32" in message for message in caplog.messages] == [True]
