"""An answer that runs at a client: its events come out, and its scale may be changed."""

from collections.abc import AsyncGenerator, Generator
from typing import Self

from colm.events import Event
from colm.scale import Changing, ScaleWish


class _Changeable:
    def __init__(self, scale: Changing[ScaleWish | None]) -> None:
        self._scale = scale

    def change_scale(self, num_chains: int | None = None, min_chains: int | None = None) -> None:
        """Ask for other chains, from the next token on that no decode step has begun with; nothing is computed again.

        `ScaleChanged` says when that holds, and each token at which scale it was made. A scale that the model does not
        have ends the answer with `InvalidRequest`.

        Args:
            num_chains: most chains; None for all.
            min_chains: fewest: the decode node chooses for each token, by its load; None for always `num_chains`.

        Raises:
            InvalidRequest: a value that no model has.
        """
        self._scale.change(ScaleWish(num_chains=num_chains, min_chains=min_chains))


class Generation(_Changeable):
    """Iterates over the events of an answer; `close` cancels it. Another thread may change the scale."""

    def __init__(self, events: Generator[Event], scale: Changing[ScaleWish | None]) -> None:
        super().__init__(scale)
        self._events = events

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        """Cancel the request, unless it has ended."""
        self._events.close()


class AsyncGeneration(_Changeable):
    """`Generation` for asyncio."""

    def __init__(self, events: AsyncGenerator[Event], scale: Changing[ScaleWish | None]) -> None:
        super().__init__(scale)
        self._events = events

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        return await anext(self._events)

    async def aclose(self) -> None:
        """Cancel the request, unless it has ended."""
        await self._events.aclose()
