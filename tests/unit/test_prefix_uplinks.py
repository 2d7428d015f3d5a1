"""When a beginning is worth bringing up: bytes at what was measured, against the seconds of computing it."""

import numpy as np
import pytest
import torch

from colm.flops import LayerFlops
from colm.kv import KvFormat, KvTile
from prefill_node.cost_model import CostModel, PrefillShape
from prefill_node.prefix_cache import PrefixCache, PrefixHold
from prefill_node.prefix_uplink import FLOOR_BYTES_S, IDLE_S, PrefixUplink, PrefixUplinks
from tests.clock import FakeClock

TILE_TOKENS, NUM_TILES = 4, 6
NUM_TOKENS = TILE_TOKENS * NUM_TILES + 1
FORMAT = KvFormat(num_layers=2, num_kv_heads=1, head_dim=2, dtype=torch.float32)
TILE_BYTES = TILE_TOKENS * FORMAT.token_bytes
PROMPT = np.arange(NUM_TOKENS)


class Bench:
    """Uplinks beside an engine of which a tile in all layers takes so many times what moving it at the floor takes."""

    def __init__(self, tile_x: float, room_tiles: int = 2 * NUM_TILES) -> None:
        shape = PrefillShape(
            layer=LayerFlops(keys_values=1, rest=1), num_layers=2, num_heads=1, head_dim=2, tile_tokens=TILE_TOKENS
        )
        step_s = tile_x * TILE_BYTES / FLOOR_BYTES_S / FORMAT.num_layers
        costs = CostModel(shape=shape, linear_flop_s=0.0, attention_flop_s=0.0, step_s=step_s, kept_s=0.0)
        self.clock = FakeClock()
        self.prefixes = PrefixCache(FORMAT, tile_tokens=TILE_TOKENS, budget_bytes=room_tiles * TILE_BYTES)
        self.uplinks = PrefixUplinks(self.prefixes, costs, FORMAT, self.clock)

    def begin(self, held_tokens: int = TILE_TOKENS * NUM_TILES) -> tuple[PrefixHold, PrefixUplink | None]:
        hold = self.prefixes.hold(PROMPT, b"")
        begun = self.uplinks.begin(
            hold, num_tokens=NUM_TOKENS, held_tokens=held_tokens, transfer_id="t", epoch=1, on_change=lambda: None
        )
        return hold, begun

    def bring(self, uplink: PrefixUplink, num_tiles: int) -> None:
        """Tiles whose values say where they are."""
        first = uplink.num_tokens // TILE_TOKENS
        while (uplink.take_word()) is not None:
            pass
        for number in range(first, first + num_tiles):
            for layer in range(FORMAT.num_layers):
                k_KTD = torch.full((1, TILE_TOKENS, 2), float(10 * number + layer))
                uplink.take(KvTile(layer, number * TILE_TOKENS, k_KTD, -k_KTD), transfer_id="t", epoch=1)
            uplink.take_word()


@pytest.mark.parametrize(("tile_x", "is_asked"), [(1.01, True), (0.99, False)])
def test_what_is_computed_sooner_than_it_moves_at_the_floor_is_not_asked_for(tile_x: float, is_asked: bool) -> None:
    hold, uplink = Bench(tile_x).begin()
    assert (uplink is not None) == is_asked
    assert len(hold.filled) == NUM_TILES * is_asked


def test_a_slow_stream_stops_the_next_one_and_is_forgotten() -> None:
    bench = Bench(2.0)
    _, uplink = bench.begin()
    assert uplink is not None
    bench.clock.now_s += IDLE_S
    uplink.expire()
    asked = [bench.begin()[1] is not None for _ in range(10)]
    assert not asked[0]
    assert any(asked)
    assert uplink.take_word() is not None, "the decode node is told"


def test_only_what_has_room_is_asked_for_and_what_came_is_whole() -> None:
    bench = Bench(2.0, room_tiles=3)
    hold, uplink = bench.begin()
    assert uplink is not None
    bench.bring(uplink, 2)
    assert (uplink.num_tokens, uplink.is_over) == (2 * TILE_TOKENS, False)
    bench.bring(uplink, 1)
    assert uplink.outcome == "complete"
    assert [kept.first_token for kept in hold.read] == [0, TILE_TOKENS, 2 * TILE_TOKENS]
    assert [kept.tile(1).k_KTD.unique().item() for kept in hold.read] == [1, 11, 21]
    bench.prefixes.check_integrity([hold])


def test_what_is_held_as_far_as_it_is_kept_here_is_not_asked_for() -> None:
    bench = Bench(2.0)
    hold, uplink = bench.begin(held_tokens=2 * TILE_TOKENS)
    assert uplink is not None
    bench.bring(uplink, 2)
    bench.prefixes.close(hold)
    assert bench.begin(held_tokens=2 * TILE_TOKENS)[1] is None
    _, further = bench.begin(held_tokens=3 * TILE_TOKENS)
    assert further is not None
    word = further.take_word()
    assert word is not None
    assert (word.first_token, word.end_token) == (2 * TILE_TOKENS, 3 * TILE_TOKENS)


def test_another_jobs_tiles_of_the_same_beginning_are_not_held_twice() -> None:
    bench = Bench(2.0)
    (one, first), (other, second) = bench.begin(), bench.begin()
    assert first is not None
    assert second is not None
    bench.bring(first, 3)
    bench.bring(second, 4)
    assert (len(one.read), len(other.read)) == (3, 4)
    bench.prefixes.check_integrity([one, other])
    first.close()
    second.close()
    assert bench.prefixes.held_bytes == 4 * TILE_BYTES
    for hold in (one, other):
        bench.prefixes.close(hold)
    bench.prefixes.check_integrity([])
