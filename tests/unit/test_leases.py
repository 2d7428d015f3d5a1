"""A lease serves one stream, once, and ends as soon as its stream or its holder ends it."""

import asyncio
from contextlib import aclosing

import pytest

from colm.errors import LeaseExpired
from colm.leases import LeaseTable

LONG_S = 60.0
SHORT_S = 0.01


async def test_a_granted_lease_can_be_opened_once() -> None:
    table = LeaseTable(LONG_S)
    lease = table.grant()
    assert table.open(lease.lease_id) is lease
    with pytest.raises(LeaseExpired, match=f"{lease.lease_id}.*was used before"):
        table.open(lease.lease_id)


@pytest.mark.parametrize("lease_id", ["", "0123456789abcdef"])
async def test_a_lease_that_was_never_granted_is_refused(lease_id: str) -> None:
    table = LeaseTable(LONG_S)
    table.grant()
    with pytest.raises(LeaseExpired, match="granted by this node"):
        table.open(lease_id)


async def test_a_released_lease_is_refused() -> None:
    table = LeaseTable(LONG_S)
    lease = table.grant()
    table.release(lease)
    with pytest.raises(LeaseExpired):
        table.open(lease.lease_id)


async def test_releasing_twice_is_harmless() -> None:
    table = LeaseTable(LONG_S)
    kept, lease = table.grant(), table.grant()
    table.release(lease)
    table.release(lease)
    assert len(table) == 1
    assert table.open(kept.lease_id) is kept


async def test_lease_ids_are_not_repeated() -> None:
    table = LeaseTable(LONG_S)
    assert len({table.grant().lease_id for _ in range(100)}) == 100


async def test_an_offer_gives_the_address_and_stays_until_the_stream_has_ended() -> None:
    table = LeaseTable(LONG_S)
    async with aclosing(table.offer("host:1", again=False)) as offer:
        address, lease_id = await anext(offer)
        assert address == "host:1"
        rest = asyncio.ensure_future(anext(offer, None))
        lease = table.open(lease_id)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not rest.done()
        table.release(lease)
        assert await asyncio.wait_for(rest, LONG_S) is None
    assert len(table) == 0


async def test_an_offer_that_nobody_takes_up_expires() -> None:
    table = LeaseTable(SHORT_S)
    grants = [grant async for grant in table.offer("host:1", again=False)]
    assert len(grants) == 1
    assert len(table) == 0
    with pytest.raises(LeaseExpired):
        table.open(grants[0][1])


async def test_an_opened_lease_outlives_its_time_to_live() -> None:
    table = LeaseTable(SHORT_S)
    async with aclosing(table.offer("host:1", again=False)) as offer:
        _, lease_id = await anext(offer)
        lease = table.open(lease_id)
        rest = asyncio.ensure_future(anext(offer, None))
        await asyncio.sleep(3 * SHORT_S)
        assert not rest.done()
        table.release(lease)
        assert await asyncio.wait_for(rest, LONG_S) is None


async def test_an_offer_whose_holder_goes_away_ends_the_lease() -> None:
    table = LeaseTable(LONG_S)
    async with aclosing(table.offer("host:1", again=False)) as offer:
        _, lease_id = await anext(offer)
    assert len(table) == 0
    with pytest.raises(LeaseExpired):
        table.open(lease_id)


async def test_an_offer_that_is_cancelled_ends_the_lease() -> None:
    table = LeaseTable(LONG_S)
    offer = table.offer("host:1", again=False)
    await anext(offer)
    rest = asyncio.ensure_future(anext(offer, None))
    await asyncio.sleep(0)
    rest.cancel()
    with pytest.raises(asyncio.CancelledError):
        await rest
    assert len(table) == 0


async def test_an_offer_goes_on_with_a_lease_of_its_own_for_each_stream() -> None:
    table = LeaseTable(LONG_S)
    lease_ids = []
    async with aclosing(table.offer("host:1", again=True)) as offer:
        async for _, lease_id in offer:
            lease_ids.append(lease_id)
            if len(lease_ids) == 3:
                break
            table.release(table.open(lease_id))
        assert len(table) == 1
        for used_up in lease_ids[:2]:
            with pytest.raises(LeaseExpired):
                table.open(used_up)
    assert len(set(lease_ids)) == 3
    assert len(table) == 0


async def test_an_offer_whose_next_lease_is_not_taken_up_ends() -> None:
    """A holder that died keeps no replica."""
    table = LeaseTable(SHORT_S)
    lease_ids = []
    async for _, lease_id in table.offer("host:1", again=True):
        if not lease_ids:
            table.release(table.open(lease_id))
        lease_ids.append(lease_id)
    assert len(lease_ids) == 2
    assert len(table) == 0
