"""The benchmark of a million tokens at a few hundred: what it counts, what it checks, and that it goes on."""

from pathlib import Path

import pytest
import torch

from bench.harness.records import append
from bench.million.__main__ import finished
from bench.million.cell import Cell, needed_flops
from bench.million.sink import Sink, check
from bench.prefill.case import prompt
from bench.random_weights import RandomWeights
from colm.flops import prefill_flops
from colm.kv import KvFormat, KvTile
from prefill_node.engine import PrefillEngine
from prefill_node.sparse.planner import SparsePlanner
from prefill_node.sparse.policy import AuditPolicy, SparsePolicy
from prefill_node.sparse.prompt_plans import PromptPlans
from tests.tiny import tiny_config

CONFIG = tiny_config(chains=(4,), num_layers=3, max_context=4096)
POLICY = SparsePolicy(mass=None, keys_per_row=400, dense_below_tokens=0)
AUDIT = AuditPolicy(floor=0.0, max_cost=0.049)


def cell(**options: object) -> Cell:
    fields: dict[str, object] = {
        "preset": "tiny",
        "config": CONFIG,
        "num_tokens": 1500,
        "attention": "sparse",
        "policy": POLICY,
        "audit": AUDIT,
        "dtype": torch.float32,
        "tile_tokens": 256,
        "seed": 0,
    }
    return Cell(**(fields | options))  # type: ignore[arg-type]


def received(num_tokens: int) -> Sink:
    """What a sparse run of the engine brings, whole."""
    source = RandomWeights(config=CONFIG, dtype=torch.bfloat16, seed=0)
    kv_format = KvFormat.of(CONFIG, torch.float32)
    sink = Sink(kv_format, num_tokens)
    plans = PromptPlans(SparsePlanner(CONFIG, POLICY), AUDIT)
    for tile in PrefillEngine(source, kv_format, tile_tokens=256).run(prompt(CONFIG, num_tokens, 0), sparse=plans):
        if tile.num_tokens:
            sink.write(torch.zeros(0, dtype=torch.int32).numpy(), tile)
    return sink


def test_what_came_is_held_against_the_models_definition() -> None:
    checked = check(received(1500), CONFIG, prompt(CONFIG, 1500, 0), 0, last_rows=True)
    assert [each.split(",")[0] for each in checked] == [
        "layer 0 of 64 sampled rows",
        "every layer of the first 256 rows",
        "layer 1 of the last 2 rows",
    ]


@pytest.mark.parametrize(
    ("layer", "first_token"), [(2, 100), (1, 1499)], ids=["a first row's last layer", "a last row's layer 1"]
)
def test_a_wrong_value_is_found(layer: int, first_token: int) -> None:
    sink = received(1500)
    wrong = torch.full((sink.layout.kv_format.num_kv_heads, 1, sink.layout.kv_format.head_dim), 3.0)
    sink.write(torch.zeros(0, dtype=torch.int32).numpy(), KvTile(layer, first_token, wrong, wrong))
    with pytest.raises(AssertionError):
        check(sink, CONFIG, prompt(CONFIG, 1500, 0), 0, last_rows=True)


def test_dense_layers_need_all_products_and_sparse_ones_their_share() -> None:
    dense = needed_flops(cell(attention="dense"), {})
    assert dense == prefill_flops(CONFIG, 1500)
    half = needed_flops(cell(), {0: 0.5, 1: 0.5})
    linear = dense - 2 * (dense - half)
    assert needed_flops(cell(), {0: 0.0, 1: 0.0}) == pytest.approx(linear)


def test_a_finished_cell_is_found_behind_a_line_that_was_cut(tmp_path: Path) -> None:
    output = tmp_path / "records" / "million.jsonl"
    assert finished(output) == []
    append(output, [{"cell": cell().key, "total_s": 1.0}])
    with output.open("a", encoding="utf-8") as file:
        file.write('{"cell": {"pre')
    append(output, [{"cell": cell(attention="dense").key, "total_s": 2.0}])
    assert [record["cell"] for record in finished(output)] == [cell().key, cell(attention="dense").key]
    assert cell(num_tokens=1501).key not in [record["cell"] for record in finished(output)]
