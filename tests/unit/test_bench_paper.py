"""The paper's figures: they belong to presets that have the shape the tables state, and wrong ones are not used."""

import json

import pytest

from bench import paper
from colm.model.presets import preset
from colm.model.transformer import slice_config

ROWS = json.loads(paper.PATH.read_text())["rows"]
LENGTHS = [2 << each for each in range(10, 20)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["preset"])
def test_every_row_is_a_preset_of_the_shape_that_the_table_states(row: dict[str, object]) -> None:
    config = preset(str(row["preset"]))
    stated = (row["chains"], row["num_layers"], row["dim"], row["chain1_dim"])
    assert (list(config.chains), config.num_layers, config.dim, slice_config(config, 1).dim) == stated


def test_every_row_has_ten_dense_and_four_sparse_lengths() -> None:
    tables = paper.load()
    assert len(ROWS) == 14
    for attention, lengths in {"dense": LENGTHS, "sparse": LENGTHS[6:]}.items():
        for name in tables.rows:
            assert [cell.num_tokens for cell in tables.cells.values() if cell.key[:2] == (name, attention)] == lengths


def test_a_speedup_is_over_the_dense_baseline() -> None:
    tables = paper.load()
    assert tables.speedup("llama-3.2-1b-16-16-air", "dense", 1 << 20) == 522 / 265
    assert tables.speedup("llama-3.2-1b-16-16-air", "sparse", 1 << 20) == 522 / 20.1
    assert tables.speedup("llama-3.2-1b", "dense", 2048) == 1
    assert tables.speedup("llama-3.2-1b", "sparse", 2048) is None
    assert tables.speedup("llama", "dense", 2048) is None


def test_a_cell_that_the_paper_has_wrong_has_a_reason_and_no_speedup() -> None:
    tables = paper.load()
    wrong = [cell.key for cell in tables.cells.values() if cell.suspect]
    row = "llama-3.1-8b-8-24-air-same-params"
    assert wrong == [
        ("llama-3.1-8b-8-8-8-8-air", "sparse", 1 << 20),
        (row, "dense", 16 << 10),
        (row, "dense", 32 << 10),
    ]
    assert [tables.speedup(*key) for key in wrong] == 3 * [None]
