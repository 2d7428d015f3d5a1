"""The ledger admits exactly one sequence of tiles; a refused tile leaves no trace."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm.errors import PeerUnavailable
from colm.kv_position import KV_START, KvPosition
from decode_node.transfer_ledger import Arrival, TransferLedger

TOKEN_BYTES = 24


@dataclass(frozen=True)
class Stream:
    """A transfer and one valid sequence of its tiles."""

    num_layers: int
    num_tokens: int
    arrivals: tuple[Arrival, ...]

    def ledger(self) -> TransferLedger:
        """In epoch 3, as after two streams that brought nothing."""
        ledger = TransferLedger(transfer_id="t-1", num_layers=self.num_layers, num_tokens=self.num_tokens)
        assert [ledger.begin() for _ in range(3)] == [1, 2, 3]
        return ledger

    @property
    def payload_bytes(self) -> int:
        return self.num_layers * self.num_tokens * TOKEN_BYTES


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    num_layers, num_tokens = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    arrivals = []
    for layer in range(num_layers):
        inner = [token for token in range(1, num_tokens) if draw(st.booleans())]
        bounds = [0, *inner, num_tokens]
        for first, last in pairwise(bounds):
            arrivals.append(
                Arrival(
                    transfer_id="t-1",
                    epoch=3,
                    layer=layer,
                    first_token=first,
                    num_tokens=last - first,
                    payload_bytes=(last - first) * TOKEN_BYTES,
                    effective_bytes=2 * (last - first) * TOKEN_BYTES,
                )
            )
    return Stream(num_layers, num_tokens, tuple(arrivals))


def noted(ledger: TransferLedger) -> tuple[Any, ...]:
    counts = ledger.num_tiles, ledger.payload_bytes, ledger.effective_bytes
    return *counts, ledger.num_tokens_done, ledger.is_whole


def admit_all(ledger: TransferLedger, arrivals: tuple[Arrival, ...]) -> None:
    for arrival in arrivals:
        ledger.admit(arrival)


def assert_refused_without_a_trace(stream: Stream, position: int, wrong: Arrival) -> None:
    """Refuse `wrong` after `position` right tiles, then go on as if it had never come."""
    ledger = stream.ledger()
    admit_all(ledger, stream.arrivals[:position])
    before = noted(ledger)
    with pytest.raises(PeerUnavailable, match="broke the KV stream's order"):
        ledger.admit(wrong)
    assert noted(ledger) == before
    admit_all(ledger, stream.arrivals[position:])
    ledger.complete(transfer_id="t-1", epoch=3, num_tiles=len(stream.arrivals), payload_bytes=stream.payload_bytes)


@given(streams())
def test_the_right_sequence_is_admitted_and_counted(stream: Stream) -> None:
    ledger = stream.ledger()
    arrived = 0
    for number, arrival in enumerate(stream.arrivals):
        assert not ledger.is_whole
        ledger.admit(arrival)
        arrived += arrival.num_tokens
        assert ledger.num_tiles == number + 1
        assert ledger.payload_bytes == arrived * TOKEN_BYTES
        assert ledger.num_tokens_done == arrived // stream.num_layers
    assert ledger.is_whole
    assert ledger.num_tokens_done == stream.num_tokens
    ledger.complete(transfer_id="t-1", epoch=3, num_tiles=len(stream.arrivals), payload_bytes=stream.payload_bytes)


@given(streams(), st.data())
def test_what_one_stream_brought_is_not_asked_of_the_next(stream: Stream, data: st.DataObject) -> None:
    """Streams break anywhere; each counts its own tiles, and the last one says how many those were."""
    breaks = data.draw(st.sets(st.integers(0, len(stream.arrivals))))
    ledger, epoch, num_tiles, payload_bytes = stream.ledger(), 3, 0, 0
    for number, arrival in enumerate(stream.arrivals):
        if number in breaks:
            late = replace(arrival, epoch=epoch)
            epoch, num_tiles, payload_bytes = ledger.begin(), 0, 0
            with pytest.raises(PeerUnavailable, match=f"tile of epoch {epoch - 1}, this is {epoch}"):
                ledger.admit(late)
        assert ledger.position == (arrival.layer, arrival.first_token)
        ledger.admit(replace(arrival, epoch=epoch))
        num_tiles, payload_bytes = num_tiles + 1, payload_bytes + arrival.payload_bytes
    assert ledger.position == (stream.num_layers, 0)
    ledger.complete(transfer_id="t-1", epoch=epoch, num_tiles=num_tiles, payload_bytes=payload_bytes)


@given(streams(), st.data(), st.sampled_from(["layer", "first_token", "epoch"]), st.integers(-4, 4).filter(bool))
def test_a_tile_from_elsewhere_is_refused(stream: Stream, data: st.DataObject, field: str, offset: int) -> None:
    position = data.draw(st.integers(0, len(stream.arrivals) - 1))
    right = stream.arrivals[position]
    assert_refused_without_a_trace(stream, position, replace(right, **{field: getattr(right, field) + offset}))


@given(streams(), st.data(), st.text(max_size=4).filter(lambda text: text != "t-1"))
def test_a_tile_of_another_transfer_is_refused(stream: Stream, data: st.DataObject, transfer_id: str) -> None:
    position = data.draw(st.integers(0, len(stream.arrivals) - 1))
    assert_refused_without_a_trace(stream, position, replace(stream.arrivals[position], transfer_id=transfer_id))


@given(streams(), st.data())
def test_a_count_that_leaves_the_layer_is_refused(stream: Stream, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(stream.arrivals) - 1))
    right = stream.arrivals[position]
    left = stream.num_tokens - right.first_token
    count = data.draw(st.integers(-1, left + 3).filter(lambda count: not 1 <= count <= left))
    wrong = replace(right, num_tokens=count, payload_bytes=count * TOKEN_BYTES)
    assert_refused_without_a_trace(stream, position, wrong)


@given(streams(), st.data())
def test_a_tile_that_came_already_is_refused(stream: Stream, data: st.DataObject) -> None:
    position = data.draw(st.integers(1, len(stream.arrivals)))
    earlier = data.draw(st.integers(0, position - 1))
    assert_refused_without_a_trace(stream, position, stream.arrivals[earlier])


@given(streams().filter(lambda stream: len(stream.arrivals) > 1), st.data())
def test_a_tile_that_comes_too_early_is_refused(stream: Stream, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(stream.arrivals) - 2))
    later = data.draw(st.integers(position + 1, len(stream.arrivals) - 1))
    assert_refused_without_a_trace(stream, position, stream.arrivals[later])


@given(streams(), st.integers(0, 3))
def test_a_tile_after_the_last_is_refused(stream: Stream, layers_further: int) -> None:
    extra = replace(stream.arrivals[-1], layer=stream.num_layers + layers_further, first_token=0)
    assert_refused_without_a_trace(stream, len(stream.arrivals), extra)


@given(streams(), st.data())
def test_complete_before_the_last_tile_is_refused(stream: Stream, data: st.DataObject) -> None:
    ledger = stream.ledger()
    arrivals = stream.arrivals[: data.draw(st.integers(0, len(stream.arrivals) - 1))]
    admit_all(ledger, arrivals)
    with pytest.raises(PeerUnavailable, match="complete after layer"):
        ledger.complete(transfer_id="t-1", epoch=3, num_tiles=ledger.num_tiles, payload_bytes=ledger.payload_bytes)


@given(streams(), st.sampled_from(["num_tiles", "payload_bytes"]), st.integers(-3, 3).filter(bool))
def test_complete_with_another_count_is_refused(stream: Stream, field: str, offset: int) -> None:
    ledger = stream.ledger()
    admit_all(ledger, stream.arrivals)
    counts = {"num_tiles": len(stream.arrivals), "payload_bytes": stream.payload_bytes}
    counts[field] += offset
    with pytest.raises(PeerUnavailable, match="arrived"):
        ledger.complete(transfer_id="t-1", epoch=3, **counts)


@given(streams(), st.sampled_from([{"transfer_id": "t-2"}, {"epoch": 2}, {"epoch": 4}]))
def test_a_strangers_completion_is_refused(stream: Stream, wrong: dict[str, Any]) -> None:
    ledger = stream.ledger()
    admit_all(ledger, stream.arrivals)
    right = {"transfer_id": "t-1", "epoch": 3, "num_tiles": ledger.num_tiles, "payload_bytes": ledger.payload_bytes}
    with pytest.raises(PeerUnavailable, match="completion of"):
        ledger.complete(**(right | wrong))


def test_a_refusal_names_what_came_and_what_was_expected() -> None:
    stream = Stream(2, 4, ())
    wrong = Arrival(
        transfer_id="t-1", epoch=3, layer=1, first_token=0, num_tokens=4, payload_bytes=96, effective_bytes=96
    )
    with pytest.raises(PeerUnavailable, match="tile at layer 1 token 0, expected layer 0 token 0"):
        stream.ledger().admit(wrong)


@given(streams(), st.data())
def test_what_is_reached_shows_until_more_has_arrived_and_does_no_more(stream: Stream, data: st.DataObject) -> None:
    ledger, done = stream.ledger(), [0]
    for arrival in stream.arrivals:
        first = (arrival.layer, arrival.first_token)
        token = data.draw(st.integers(0, arrival.num_tokens - 1))
        ledger.reach(KvPosition(arrival.layer, arrival.first_token + token))
        assert ledger.position == first
        done.append(ledger.num_tokens_done)
        assert done[-1] == (first[0] * stream.num_tokens + first[1] + token) // stream.num_layers
        ledger.reach(KV_START)
        ledger.admit(arrival)
        done += [ledger.num_tokens_done] * 2
    assert done == sorted(done)
    assert done[-1] == stream.num_tokens


@pytest.mark.parametrize("position", [(0, 5), (2, 1), (3, 0)])
def test_a_place_outside_the_transfer_cannot_be_reached(position: tuple[int, int]) -> None:
    ledger = TransferLedger(transfer_id="t-1", num_layers=2, num_tokens=5)
    with pytest.raises(PeerUnavailable, match=f"layer {position[0]} token {position[1]} is reached, of 2 layers"):
        ledger.reach(KvPosition(*position))
    assert ledger.num_tokens_done == 0


def test_in_a_transfer_from_a_token_every_layer_begins_there() -> None:
    ledger = TransferLedger(transfer_id="t-1", num_layers=2, num_tokens=9, first_token=4)
    ledger.begin()
    for layer in range(2):
        for first, num_tokens in ((4, 3), (7, 2)):
            right = Arrival(
                transfer_id="t-1",
                epoch=1,
                layer=layer,
                first_token=first,
                num_tokens=num_tokens,
                payload_bytes=num_tokens,
                effective_bytes=num_tokens,
            )
            with pytest.raises(PeerUnavailable, match=f"expected layer {layer} token {first}"):
                ledger.admit(replace(right, first_token=0))
            ledger.admit(right)
    assert ledger.position == (2, 0)
    ledger.complete(transfer_id="t-1", epoch=1, num_tiles=4, payload_bytes=10)
