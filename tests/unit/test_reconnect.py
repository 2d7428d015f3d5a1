"""Which call of a client comes next after one that failed."""

import io
from dataclasses import replace
from typing import Any

import pytest

from colm.errors import (
    CapacityExceeded,
    ColmError,
    ConnectionLost,
    DeadlineExceeded,
    GoingAway,
    InvalidRequest,
    ModelReplaced,
    PeerUnavailable,
    PrefillUnavailable,
    UnknownAnswer,
)
from colm.events import Accepted, Reconnecting, Token
from colm.reconnect import Attempts, KnownGateway
from colm.retry import RetryPolicy
from colm.scale import Changing, ScaleWish
from colm.wire.v1 import common_pb2
from colm.wire.v1 import generation_service_pb2 as pb
from tests.clock import FakeClock

LOST = ConnectionLost("lost")
ACCEPTED = Accepted(request_id="r", model="m", num_prompt_tokens=3, num_chains=1, max_new_tokens=9, timeout_s=100.0)
RETRY = RetryPolicy(max_attempts=3, first_pause_s=0.5, last_pause_s=0.6)


def token(token_id: int) -> Token:
    return Token(token_id=token_id, text="", logprob=0.0, num_chains=1)


def attempts(
    document: Any = b"abc", *, reconnects: bool = True, gateway: KnownGateway | None = None, **options: Any
) -> tuple[Attempts, FakeClock]:
    clock, scale, gateway = FakeClock(), Changing[ScaleWish | None](None), gateway or KnownGateway()
    made = Attempts(
        document, "?", options, scale=scale, reconnects=reconnects, gateway=gateway, clock=clock, retry=RETRY
    )
    return made, clock


def sent(request: Attempts) -> list[pb.GenerateRequest]:
    return list(request.messages)


def document_of(messages: list[pb.GenerateRequest]) -> bytes:
    return b"".join(message.document for message in messages)


def begun(**options: Any) -> tuple[Attempts, FakeClock, str]:
    """A request with two tokens of its answer, and the key of that."""
    request, clock = attempts(**options)
    key = sent(request)[0].open.answer_key
    assert [request.see(event) for event in (ACCEPTED, token(7), token(8))] == [ACCEPTED, token(7), token(8)]
    return request, clock, key


def test_a_gateway_that_was_never_there_is_not_looked_for_again() -> None:
    request, _ = attempts()
    next(iter(request.messages))
    with pytest.raises(ConnectionLost):
        request.after(LOST)


def test_a_gateway_that_an_earlier_request_has_reached_is_looked_for_again() -> None:
    """Bug: a request that began while the gateway was being replaced failed at once."""
    gateway = KnownGateway()
    earlier, _ = attempts(gateway=gateway)
    earlier.see(ACCEPTED)
    request, _ = attempts(gateway=gateway)
    request.after(LOST)
    assert document_of(sent(request)) == b"abc"


def test_a_gateway_is_not_looked_for_beyond_the_requests_deadline() -> None:
    """Bug: calls went on for half a minute, and the next gateway refused a `timeout_s` below zero."""
    request, clock, _ = begun(timeout_s=20.0)
    clock.now_s += 20.0
    with pytest.raises(DeadlineExceeded, match="lost"):
        request.after(LOST)


def test_a_gateway_that_stops_is_asked_again_where_its_successor_may_be() -> None:
    request, _ = attempts()
    request.after(GoingAway("the gateway is stopping"))
    request.see(ACCEPTED)
    request.see(token(7))
    request.after(GoingAway("this answer has not ended in time"))
    assert sent(request)[0].resume.num_tokens == 1


def test_a_request_that_was_lost_before_it_was_accepted_is_sent_again_whole() -> None:
    request, _ = attempts()
    first = sent(request)
    assert request.after(LOST) == Reconnecting(in_s=0.5, cause="lost")
    second = sent(request)
    assert document_of(second) == document_of(first) == b"abc"
    assert second[0].open.answer_key != first[0].open.answer_key


def test_the_rest_of_an_answer_is_asked_for_by_its_key_and_accepted_is_heard_once() -> None:
    request, _, key = begun()
    request.after(LOST)
    (message,) = sent(request)
    assert (message.resume.answer_key, message.resume.num_tokens) == (key, 2)
    assert not request.see(ACCEPTED)
    assert request.see(token(9)) == token(9)
    request.after(LOST)
    assert sent(request)[0].resume.num_tokens == 3


@pytest.mark.parametrize("error", [UnknownAnswer("gone"), PeerUnavailable("its decode node was lost as well")])
def test_an_answer_that_is_held_nowhere_is_made_anew_behind_what_has_come(error: ColmError) -> None:
    request, clock, key = begun()
    request.after(LOST)
    sent(request)
    clock.now_s += 30.0
    request.after(error)
    messages = sent(request)
    assert list(messages[0].open.answer_token_ids) == [7, 8]
    assert messages[0].open.answer_key not in ("", key)
    assert messages[0].open.timeout_s == 70.0, "one deadline holds for the whole request"
    assert document_of(messages) == b"abc"
    assert not request.see(ACCEPTED)


def test_an_answer_that_is_made_anew_names_the_weights_that_it_began_with() -> None:
    """Another checkpoint may have taken their place, and no answer is of two."""
    request, _ = attempts()
    sent(request)
    request.see(replace(ACCEPTED, revision="old"))
    request.after(LOST)
    request.after(UnknownAnswer("gone"))
    assert sent(request)[0].open.revision == "", "nothing is there that would not fit"
    request.see(replace(ACCEPTED, revision="new"))
    request.see(token(7))
    request.after(LOST)
    request.after(UnknownAnswer("gone"))
    assert sent(request)[0].open.revision == "new"
    with pytest.raises(ModelReplaced):
        request.after(ModelReplaced("it is another one by now"))


def test_a_scale_that_was_changed_is_asked_for_again_by_every_later_call() -> None:
    """The gateway that was told of it may be lost, and the decode node too."""
    request, _, _ = begun(num_chains=3)
    assert list(request.change) == []
    request.scale.change(ScaleWish(num_chains=2, min_chains=1))
    (change,) = request.change
    request.after(LOST)
    resume, again = sent(request)
    assert resume.HasField("resume")
    assert again == change == pb.GenerateRequest(change_scale=common_pb2.Scale(num_chains=2, min_chains=1))
    request.after(UnknownAnswer("gone"))
    opened, *_, last = sent(request)
    assert (opened.open.num_chains, opened.open.min_chains) == (2, 1)
    assert last == change


def test_a_clients_own_deadline_holds_over_all_calls() -> None:
    request, clock, _ = begun(timeout_s=20.0)
    assert request.call_timeout_s == 25.0
    clock.now_s += 15.0
    request.after(LOST)
    assert request.call_timeout_s == 10.0


def test_a_document_that_can_be_read_once_is_not_sent_again() -> None:
    request, _, _ = begun(document=io.BytesIO(b"abc"))
    request.after(LOST)  # the rest of the answer needs no document
    with pytest.raises(UnknownAnswer):
        request.after(UnknownAnswer("gone"))


@pytest.mark.parametrize(
    "error",
    [
        PeerUnavailable("four decode nodes were lost"),
        PrefillUnavailable("gave up"),
        InvalidRequest("a", 1, "b"),
        DeadlineExceeded("over"),
        CapacityExceeded("full"),
    ],
)
def test_what_a_gateway_says_of_a_request_is_final(error: ColmError) -> None:
    request, _, _ = begun()
    with pytest.raises(type(error)):
        request.after(error)


def test_a_gateway_that_is_full_of_returning_clients_is_asked_again() -> None:
    request, _, _ = begun()
    request.after(LOST)
    request.after(CapacityExceeded("full"))
    assert sent(request)[0].resume.num_tokens == 2


def test_calls_in_a_row_that_bring_no_token_come_to_an_end() -> None:
    request, _, _ = begun()
    for _ in range(5):
        assert [request.after(LOST).in_s for _ in range(2)] == [0.5, 0.6]
        request.see(token(9))
    request.after(LOST)
    request.after(LOST)
    with pytest.raises(ConnectionLost):
        request.after(LOST)


def test_a_client_that_does_not_want_to_reconnect_names_no_key() -> None:
    request, _ = attempts(reconnects=False)
    assert sent(request)[0].open.answer_key == ""
    with pytest.raises(ConnectionLost):
        request.after(LOST)
