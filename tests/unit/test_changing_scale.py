"""Which scales a wish means, and who hears of a change."""

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm.beside import beside
from colm.errors import InvalidRequest, PeerFailed
from colm.scale import Changing, Scale, ScaleWish
from tests.gates import LIMIT_S


@given(wish=st.builds(ScaleWish, num_chains=st.none() | st.integers(0, 9), min_chains=st.none() | st.integers(0, 9)))
def test_a_wish_is_a_range_of_the_models_chains_or_refused_by_name(wish: ScaleWish) -> None:
    most = 4 if wish.num_chains is None else wish.num_chains
    least = most if wish.min_chains is None else wish.min_chains
    if 1 <= least <= most <= 4:
        scale = Scale.of(wish, 4)
        assert (scale.num_chains, scale.min_chains) == (most, least)
        for level in range(1, 5):
            assert scale.at(level) == min(most, max(least, level))
        return
    with pytest.raises(InvalidRequest) as refused:
        Scale.of(wish, 4)
    assert refused.value.field == ("min_chains" if 1 <= most <= 4 else "num_chains")


@pytest.mark.parametrize("value", [-1, 1.5, True, "2", 1 << 32])
@pytest.mark.parametrize("name", ["num_chains", "min_chains"])
def test_what_is_no_number_of_chains_is_refused_where_it_is_asked_for(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=name):
        ScaleWish(**{name: value})  # type: ignore[arg-type]


async def test_a_follower_sees_the_newest_value_and_ends_with_its_block() -> None:
    changing, seen = Changing(0), list[int]()
    changing.change(1)  # before anybody followed

    async def follow() -> None:
        async for value in values:
            seen.append(value)

    with changing.followed() as values:
        task = asyncio.create_task(follow())
        await asyncio.sleep(0)
        changing.change(2)
        changing.change(3)
        while not seen:
            await asyncio.sleep(0)
    async with asyncio.timeout(LIMIT_S):
        await task
    assert seen == [3]
    changing.change(4)
    assert not changing._listeners


def test_a_thread_that_waits_is_let_go() -> None:
    changing, seen = Changing(0), list[int]()
    with changing.followed_in_thread() as values:
        thread = threading.Thread(target=lambda: seen.extend(values))
        thread.start()
        changing.change(7)
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    assert seen in ([], [7])  # the end may come first
    assert not changing._listeners


async def test_work_beside_a_block_ends_with_it_and_its_error_ends_the_block() -> None:
    endless = asyncio.Event()
    async with asyncio.timeout(LIMIT_S), beside(_wait(endless)):
        pass

    async def fail() -> None:
        raise PeerFailed("beside")

    with pytest.raises(PeerFailed, match="beside"):
        async with beside(fail()):
            await endless.wait()
    with pytest.raises(PeerFailed, match="inside"):
        async with beside(_wait(endless)):
            raise PeerFailed("inside")


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
