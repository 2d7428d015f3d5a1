"""What a decode node says on a KV stream: the prompt, how far it has got, and when to say it."""

from collections.abc import Iterator

import numpy as np
import pytest

from colm.kv_position import KvPosition
from colm.wire.messages import ids_checksum
from colm.wire.tile_codec import ACKNOWLEDGE_BYTES
from colm.wire.v1 import kv_transfer_service_pb2 as pb
from decode_node import kv_requests
from decode_node.kv_fetch import KvTransfer
from decode_node.kv_requests import KvRequests
from decode_node.transfer_ledger import Arrival, TransferLedger


class Said:
    """The requests, as gRPC reads them; the prompt has been read."""

    def __init__(self) -> None:
        ledger = TransferLedger(transfer_id="t", num_layers=2, num_tokens=10)
        ledger.begin()
        ledger.admit(
            Arrival(transfer_id="t", epoch=1, layer=0, first_token=0, num_tokens=4, payload_bytes=1, effective_bytes=1)
        )
        ledger.begin()
        transfer = KvTransfer(
            ledger=ledger, fingerprint="f", token_ids=np.arange(10), table_M=np.zeros(1, dtype=np.int32)
        )
        self.num_silences = 0
        self.requests = KvRequests(transfer, "l", self._silence)
        self.words: Iterator[pb.PullKvRequest] = iter(self.requests)

    def prompt(self) -> list[pb.PullKvRequest]:
        return [next(self.words) for _ in range(3)]

    def rest(self) -> list[str | tuple[int, int]]:
        """Everything up to the caller's half-close."""
        said: list[str | tuple[int, int]] = []
        for word in self.words:
            part = word.WhichOneof("part")
            said.append((word.acknowledged.layer, word.acknowledged.token) if part == "acknowledged" else str(part))
        return said

    def _silence(self) -> None:
        self.num_silences += 1


@pytest.fixture
def said() -> Said:
    return Said()


def test_the_prompt_comes_first_and_says_what_is_there_already(said: Said) -> None:
    opened, ids, end = said.prompt()
    assert (opened.open.transfer_id, opened.open.epoch, opened.open.lease_id) == ("t", 2, "l")
    assert (opened.open.resume_from.layer, opened.open.resume_from.token) == (0, 4)
    assert list(ids.token_ids.ids) == list(range(10))
    assert end.end_of_prompt.checksum == ids_checksum(np.arange(10))


def test_positions_are_said_when_they_are_worth_a_message_the_newest_alone_and_the_end_in_any_case(said: Said) -> None:
    said.prompt()
    said.requests.stored(KvPosition(0, 5), ACKNOWLEDGE_BYTES - 1, is_last=False)
    said.requests.stored(KvPosition(0, 6), 1, is_last=False)
    assert next(said.words).acknowledged == pb.KvPosition(layer=0, token=6)
    said.requests.stored(KvPosition(0, 7), ACKNOWLEDGE_BYTES, is_last=False)
    said.requests.stored(KvPosition(1, 0), ACKNOWLEDGE_BYTES, is_last=False)
    assert next(said.words).acknowledged == pb.KvPosition(layer=1, token=0)
    said.requests.stored(KvPosition(1, 9), 1, is_last=False)
    said.requests.stored(KvPosition(2, 0), 1, is_last=True)
    said.requests.close()
    assert said.rest() == [(2, 0)]


def test_a_closed_stream_says_nothing_that_was_not_worth_a_message(said: Said) -> None:
    said.prompt()
    said.requests.stored(KvPosition(0, 5), 1, is_last=False)
    said.requests.close()
    assert said.rest() == []


@pytest.mark.parametrize("ends", [True, False])
def test_giving_up_is_said_and_a_node_that_does_not_end_the_stream_is_broken_off(
    said: Said, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    monkeypatch.setattr(kv_requests, "_GIVE_UP_S", 0.0)
    said.prompt()
    said.requests.stored(KvPosition(0, 5), ACKNOWLEDGE_BYTES, is_last=False)
    next(said.words)
    assert said.requests.give_up()
    assert next(said.words).WhichOneof("part") == "give_up"
    if ends:
        said.requests.close()
    assert said.rest() == []
    assert said.num_silences == (not ends)


def test_a_prompt_whose_end_is_on_its_way_is_given_up_by_a_word(said: Said) -> None:
    """Bug: until gRPC asked for the next message the call was broken off, and the node kept what it had begun."""
    said.prompt()
    assert said.requests.give_up()
    said.requests.close()
    assert said.rest() == ["give_up"]


def test_a_prompt_that_is_given_up_before_its_end_is_sent_is_never_ended(said: Said) -> None:
    """Bug: its end went between the word that it had not gone and the breaking off; the node kept what it had begun."""
    opened_and_ids = [next(said.words) for _ in range(2)]
    assert [each.WhichOneof("part") for each in opened_and_ids] == ["open", "token_ids"]
    assert not said.requests.give_up()
    said.requests.close()
    assert said.rest() == []


def test_there_is_nothing_to_give_up_after_the_end(said: Said) -> None:
    said.prompt()
    said.requests.close()
    assert said.rest() == []
    assert not said.requests.give_up()
