"""The scale of an answer: how many chains make its tokens, and how that may change while it runs."""

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from colm import checks
from colm.errors import InvalidRequest

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleWish:
    """What a client asks for.

    Raises:
        InvalidRequest: names the field, its value and the limit.
    """

    num_chains: int | None = None
    """Most chains; None for all."""
    min_chains: int | None = None
    """Fewest; the decode node chooses between the two for each token. None: always `num_chains`."""

    def __post_init__(self) -> None:
        for name in ("num_chains", "min_chains"):
            if (value := getattr(self, name)) is not None:
                limit = "must be an integer from 1 to the model's number of chains"
                checks.integer(name, value, range(1 << 32), limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """The chains that make an answer's tokens: `min_chains` to `num_chains`, which are equal where it is fixed."""

    num_chains: int
    min_chains: int

    @classmethod
    def of(cls, wish: ScaleWish, all_chains: int) -> Self:
        """What a wish means to a model of so many chains.

        Raises:
            InvalidRequest: the model has not so many, or the least is above the most.
        """
        num_chains = all_chains if wish.num_chains is None else wish.num_chains
        if not 1 <= num_chains <= all_chains:
            raise InvalidRequest("num_chains", num_chains, f"must be between 1 and {all_chains}")
        min_chains = num_chains if wish.min_chains is None else wish.min_chains
        if not 1 <= min_chains <= num_chains:
            raise InvalidRequest("min_chains", min_chains, f"must be between 1 and num_chains={num_chains}")
        return cls(num_chains=num_chains, min_chains=min_chains)

    def at(self, level: int) -> int:
        """Chains of the next token where the node would rather use no more than `level`."""
        return max(self.min_chains, min(self.num_chains, level))


class Changing(Generic[_T]):
    """A value that changes while others follow it; who is slow sees the newest only.

    Args:
        value: to begin with.
    """

    def __init__(self, value: _T) -> None:
        self.value = value
        self._listeners: tuple[Callable[[], None], ...] = ()

    def change(self, value: _T) -> None:
        """Change it, and tell everybody who follows."""
        self.value = value
        for listener in self._listeners:
            listener()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call a function after each change."""
        self._listeners = (*self._listeners, listener)

    @contextmanager
    def followed(self) -> Iterator[AsyncIterator[_T]]:
        """The values after changes from now on; they end with the block. All on one event loop."""
        changed, is_over = asyncio.Event(), False

        async def values() -> AsyncIterator[_T]:
            while await changed.wait() and not is_over:
                changed.clear()
                yield self.value

        self.listen(changed.set)
        try:
            yield values()
        finally:
            is_over = True
            changed.set()
            self._forget(changed.set)

    @contextmanager
    def followed_in_thread(self) -> Iterator[Iterator[_T]]:
        """As `followed`, for a thread that waits."""
        news: queue.SimpleQueue[bool] = queue.SimpleQueue()

        def values() -> Iterator[_T]:
            while news.get():
                yield self.value

        def changed() -> None:
            news.put(True)

        self.listen(changed)
        try:
            yield values()
        finally:
            news.put(False)
            self._forget(changed)

    def _forget(self, listener: Callable[[], None]) -> None:
        self._listeners = tuple(each for each in self._listeners if each != listener)
