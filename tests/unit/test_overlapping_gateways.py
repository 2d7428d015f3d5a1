"""What clients use at a gateway that gives way, as its successor counts it."""

import asyncio
from collections.abc import Mapping

import pytest

from cluster import accounts as accounts_module
from cluster.accounts import MAX_TELLERS, TOLD_S, Accounts, Use
from cluster.client_tokens import Client, TokenLimits
from cluster.replicas import telling as telling_module
from cluster.replicas.telling import Telling
from colm.errors import CapacityExceeded
from tests.clock import FakeClock
from tests.gates import LIMIT_S
from tests.unit.test_client_tokens import accepted, parts, token


def alice(**limits: int) -> Client:
    return Client(name="alice", sha256="", limits=TokenLimits(**limits))


def refuses(accounts: Accounts, client: Client, num_tokens: int = 1) -> str:
    """How one more request of so many prompt tokens is refused; empty if it is not."""
    try:
        with accounts.open(client) as usage:
            usage.see(accepted(num_tokens))
    except CapacityExceeded as err:
        return str(err)
    return ""


def test_requests_and_prompt_tokens_of_the_last_gateway_count_until_it_says_that_they_have_ended() -> None:
    """Bug: a client had each of its limits twice while two gateways overlapped."""
    last, next_one = Accounts(FakeClock()), Accounts(FakeClock())
    one, many = alice(max_requests=2), alice(max_queued_tokens=100)
    with last.open(one) as usage:
        usage.see(accepted(80))
        next_one.hear("last", last.use())
        with next_one.open(one):
            assert "may have 2 requests at once" in refuses(next_one, one)
            assert "may have 2 requests" in refuses(next_one, one), "a refusal takes nothing"
        assert "may use 100 prompt tokens" in refuses(next_one, many, 21)
        assert refuses(next_one, many, 20) == ""
        next_one.hear("last", last.use())  # said again, it is not counted twice
        assert refuses(next_one, many, 20) == ""
    next_one.hear("last", last.use())
    with next_one.open(one):
        assert refuses(next_one, many, 100) == ""


async def test_bytes_of_the_last_gateways_requests_count_too() -> None:
    accounts, client = Accounts(FakeClock()), alice(max_bytes=10)

    accounts.hear("last", {"alice": Use(num_requests=1, num_bytes=6)})
    with accounts.open(client) as usage, pytest.raises(CapacityExceeded, match="10 bytes"):
        [part async for part in usage.counted(parts(b"12345"))]
    accounts.hear("last", {})
    with accounts.open(client) as usage:
        assert [part async for part in usage.counted(parts(b"12345"))] == [b"12345"]


def test_tokens_of_the_minute_count_at_the_successor_until_each_is_a_minute_old() -> None:
    clock, other = FakeClock(), FakeClock()
    other.now_s = 12345.0  # another process's clock begins elsewhere
    last, next_one, client = Accounts(clock), Accounts(other), alice(max_tokens_per_minute=100)
    with last.open(client) as usage:
        usage.see(accepted(60))
        clock.now_s += 20.0
        usage.see(token())
    next_one.hear("last", last.use())
    assert "may use 100 tokens a minute" in (said := refuses(next_one, client, 40))
    assert said.endswith("try again in 40 s")
    assert refuses(next_one, client, 39) == ""
    other.now_s += 40.0
    assert "100 tokens a minute" in refuses(next_one, client, 61), "the token, and 39 of here"
    assert refuses(next_one, client, 60) == ""
    other.now_s += 60.0
    assert next_one.use() == {}
    assert not next_one._accounts, "nothing is kept of a client that uses nothing"


def test_a_gateway_that_is_lost_while_it_ends_is_believed_for_seconds_and_what_it_spent_for_a_minute() -> None:
    clock = FakeClock()
    accounts, client = Accounts(clock), alice(max_requests=1, max_tokens_per_minute=10)
    accounts.hear("last", {"alice": Use(num_requests=1, spent=((0.0, 10),))})
    clock.now_s += TOLD_S / 2
    assert "1 requests" in refuses(accounts, client)
    clock.now_s += TOLD_S / 2
    assert "tokens a minute" in refuses(accounts, client)
    clock.now_s += 60.0 - TOLD_S
    assert refuses(accounts, client) == ""


def test_each_client_has_its_own_and_so_many_gateways_are_believed_at_once() -> None:
    clock = FakeClock()
    accounts, client = Accounts(clock), alice(max_requests=1)
    accounts.hear("last", {"bob": Use(num_requests=1)})
    assert refuses(accounts, client) == ""
    for number in range(MAX_TELLERS + 5):
        accounts.hear(f"gateway {number}", {"bob": Use(num_requests=1)})
    assert len(accounts._accounts["bob"].told) == MAX_TELLERS
    accounts.hear("last", {"bob": Use(num_requests=1), "alice": Use(num_requests=1)})
    assert "1 requests" in refuses(accounts, client), "who is believed may say more"
    clock.now_s += TOLD_S
    accounts.hear("another", {"alice": Use(num_requests=1)})
    assert set(accounts._accounts["alice"].told) == {"another"}


def test_an_answer_that_goes_on_at_the_successor_is_refused_by_nothing_and_spends_its_prompt_once() -> None:
    accounts, client = Accounts(FakeClock()), alice(max_tokens_per_minute=100, max_queued_tokens=100)
    accounts.hear("last", {"alice": Use(spent=((1.0, 95),))})
    with accounts.open(client) as usage:
        usage.is_resumed = True
        usage.see(accepted(90))
        usage.see(token())
        assert accounts.use()["alice"] == Use(num_requests=1, num_prompt_tokens=90, spent=((0.0, 1),))
        assert "100 prompt tokens" in refuses(accounts, client, 11)
    assert refuses(accounts, client, 4) == ""


async def test_the_successor_is_told_at_once_again_and_at_the_end_that_nothing_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(telling_module, "INTERVAL_S", 0.01)
    accounts, client = Accounts(FakeClock()), alice()
    said: list[Mapping[str, Use]] = []
    news = asyncio.Event()

    async def send(uses: Mapping[str, Use]) -> None:
        said.append(uses)
        news.set()
        if len(said) == 2:
            raise ConnectionError("no gateway is there for a moment")

    async with asyncio.timeout(LIMIT_S):
        with accounts.open(client) as usage:
            usage.see(accepted(5))
            telling = Telling(accounts, send)
            while len(said) < 3:
                news.clear()
                await news.wait()
            await telling.end()  # as before answers are handed over, which run until then
            assert said[-1] == {"alice": Use(spent=((0.0, 5),))}
            num_said = len(said)
            usage.see(token())
        await telling.end()
    assert {each["alice"].num_requests for each in said[:-2]} == {1}
    assert said[num_said:] == [{"alice": Use(spent=((0.0, 6),))}]


async def test_a_successor_that_does_not_answer_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling_module, "_SEND_S", 0.01)
    accounts, asked = Accounts(FakeClock()), 0

    async def send(uses: Mapping[str, Use]) -> None:  # noqa: ARG001 - the contract
        nonlocal asked
        asked += 1
        await asyncio.Event().wait()

    async with asyncio.timeout(LIMIT_S):
        await Telling(accounts, send).end()
        assert not asked, "nobody has used anything"
        with accounts.open(alice()) as usage:
            usage.see(accepted(5))
            telling = Telling(accounts, send)
            await telling.end()
    assert asked
    assert accounts_module.TOLD_S > 2 * 1.0, "a word that is lost is none that is missed"
