"""The serving forward of a block against the oracle's, with which it shares no code.

Shapes: R rows, D model features and G query heads per kv head of the active chains, K kv heads, E head dim.
"""

from typing import Any

import pytest
import torch
from colm_kernels import tolerance
from colm_kernels.prefill_attention import prefill_attention_reference
from colm_kernels.rotary import rotate_reference
from torch import Tensor

from colm.model import block as block_module
from colm.model.attention import ChainAttention
from colm.model.block import ChainBlock, Rows
from colm.model.embedding import ChainTable
from colm.model.ffn import ChainFFN
from colm.model.linear import ChainLinear
from colm.model.norm import ChainRMSNorm
from colm.model.rope import Rope
from tests.tiny import tiny_config, tiny_model

FORMS: dict[str, dict[str, Any]] = {
    "three chains": {},
    "one chain": {"chains": (4,)},
    "one kv head": {"chains": (8, 4, 2), "num_kv_heads": 1},
    "biases": {"bias": True},
    "gelu": {"activation": "gelu"},
}
NUM_ROWS = 5


class OneText:
    """The rows are one text, and their keys and values all that there is."""

    def __init__(self) -> None:
        self.num_written = 0

    def write(self, k_RKE: Tensor, v_RKE: Tensor, rows: Rows) -> None:
        self.k_KRE = rotate_reference(k_RKE, rows.cos_RE, rows.sin_RE).transpose(0, 1)
        self.v_KRE = v_RKE.clone().transpose(0, 1)
        self.num_written += 1

    def attend(self, q_RKGE: Tensor) -> Tensor:
        return prefill_attention_reference(q_RKGE.flatten(1, 2), self.k_KRE, self.v_KRE)[0].view_as(q_RKGE)


def inputs(form: str) -> tuple[ChainBlock, Tensor, Rows]:
    """A block, its input and rows of which each chain runs fewer than the one before."""
    config = tiny_config(**FORMS[form])
    x_RD = torch.randn(NUM_ROWS, config.dim, generator=torch.Generator().manual_seed(3))
    chain_rows = [NUM_ROWS, 3, 1][: config.num_chains]
    cos_sin = Rope(config).tables(torch.arange(NUM_ROWS))
    return tiny_model(config).blocks[0], x_RD, Rows(chain_rows, *cos_sin)


@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_every_row_gets_what_the_oracle_gives_it_at_its_scale(form: str) -> None:
    block, x_RD, rows = inputs(form)
    widths = block.attention.config.chain_dims
    exact_block = tiny_model(tiny_config(**FORMS[form]), dtype=torch.float64).blocks[0]
    exact = exact_block.by_chain(x_RD.double().split(widths, dim=1), rows.cos_RE.double(), rows.sin_RE.double(), 1)
    normed_RD = block.attention_norm(x_RD, len(widths))
    x_RD += block.step(x_RD, normed_RD, rows, OneText())
    for ours, wanted, num_rows in zip(x_RD.split(widths, dim=1), exact, rows.chain_rows, strict=True):
        expected = tolerance.layers(wanted[:num_rows], torch.float32, num_layers=1, width=x_RD.shape[1])
        expected.check(ours[:num_rows])


@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_the_two_halves_are_the_whole_to_the_bit(form: str) -> None:
    block, x_RD, rows = inputs(form)
    normed_RD, cache, other_x_RD = block.attention_norm(x_RD, len(rows.chain_rows)), OneText(), x_RD.clone()
    whole_RD = block.step(x_RD, normed_RD, rows, OneText())
    block.write_keys_values(normed_RD, rows, cache)
    assert torch.equal(block.attend(other_x_RD, normed_RD, rows, cache), whole_RD)
    assert torch.equal(other_x_RD, x_RD)
    assert cache.num_written == 1


def test_the_oracle_runs_without_anything_of_the_serving_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that both had would be seen by no test."""
    model, tokens_BT = tiny_model(), torch.arange(14).view(2, 7)
    expected = model(tokens_BT)

    def must_not_run(*_: Any, **__: Any) -> None:
        raise AssertionError("the oracle runs the serving forward")

    for owner, names in {
        ChainBlock: ("step", "write_keys_values", "attend", "_after_queries"),
        ChainAttention: ("keys_values", "queries", "queries_keys_values", "group_by_kv_head", "ungroup"),
        ChainFFN: ("forward",),
        ChainLinear: ("forward", "operands"),
        ChainRMSNorm: ("forward", "add_"),
        ChainTable: ("embed", "logits"),
        block_module: ("rotate_",),
    }.items():
        for name in names:
            monkeypatch.setattr(owner, name, must_not_run)
    assert torch.equal(model(tokens_BT), expected)
