"""A request's provisional token on the decode node: asked of the prefill node, told once, and counted."""

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from enum import Enum

from colm.clock import Clock
from colm.events import Event, ProvisionalToken, Token
from colm.provisional import ProvisionalOnce
from decode_node.kv_fetch import KvOrder
from decode_node.running_answer import RunningAnswer


class ProvisionalOutcome(Enum):
    """What became of a provisional token that a prefill node was asked for."""

    CONFIRMED = "confirmed"
    REPLACED = "replaced"
    LATE = "late"
    """None had come by the answer's first token."""


_OUTCOMES = {True: ProvisionalOutcome.CONFIRMED, False: ProvisionalOutcome.REPLACED, None: ProvisionalOutcome.LATE}
"""By what the first token says of it."""


class Provisional:
    """Of one request.

    Args:
        has_begun: its answer has tokens already.
        clock: of `token_s`.
        outcomes: counts what becomes of those that are asked for.
    """

    def __init__(self, *, has_begun: bool, clock: Clock, outcomes: Counter[ProvisionalOutcome]) -> None:
        self._once = ProvisionalOnce(has_begun=has_begun)
        self._clock = clock
        self._outcomes = outcomes
        self._is_awaited = False
        self.token_s: float | None = None
        """When it was told, by the clock; None until then."""

    def asked_with(
        self, order: KvOrder, last_token_id: int, answer: RunningAnswer, emit: Callable[[Event], Awaitable[None]]
    ) -> KvOrder:
        """The order of a prompt's keys and values that asks for the token too, and has it emitted."""

        async def tell(token_id: int) -> None:
            await emit(ProvisionalToken(token_id=token_id, text=answer.text_of(token_id)))

        self._is_awaited = True
        return replace(order, last_token_id=last_token_id, on_next_token=tell)

    def see(self, event: Event) -> Event | None:
        """An event of the request as its reader shall hear it; None if it shall not."""
        news = self._once.see(event)
        if isinstance(news, ProvisionalToken):
            self.token_s = self._clock.now()
        elif isinstance(news, Token) and self._is_awaited:
            self._is_awaited = False
            self._outcomes[_OUTCOMES[news.confirms_provisional]] += 1
        return news
