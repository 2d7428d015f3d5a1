"""Rotary tables of consecutive positions: kept, bounded, and the same as made anew."""

import pytest
import torch

from colm.model import rope
from colm.model.rope import Rope
from tests.tiny import tiny_config

KEPT = 64


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Rope:
    monkeypatch.setattr(rope, "KEPT_POSITIONS", KEPT)
    return Rope(tiny_config())


def test_a_range_has_the_tables_of_its_positions_however_far_the_kept_ones_reach(tables: Rope) -> None:
    for start, stop in (
        (0, 3),
        (3, 5),
        (4, 20),
        (0, 1),
        (20, KEPT),
        (7, KEPT + 1),
        (KEPT, KEPT + 9),
        (0, KEPT),
        (5, 5),
    ):
        for found, wanted in zip(tables.range(start, stop), tables.tables(torch.arange(start, stop)), strict=True):
            assert torch.equal(found, wanted)


def test_a_range_is_kept_up_to_the_bound_alone(tables: Rope) -> None:
    def place(start: int, stop: int) -> int:
        cos_TD, _ = tables.range(start, stop)
        return cos_TD.untyped_storage().data_ptr()

    whole, _ = tables.range(0, KEPT)
    assert place(0, 3) == place(9, 20) == whole.untyped_storage().data_ptr()
    beyond, _ = tables.range(0, KEPT + 1)
    assert beyond.untyped_storage().data_ptr() != place(0, KEPT)
    assert beyond.untyped_storage().nbytes() == beyond.nbytes
