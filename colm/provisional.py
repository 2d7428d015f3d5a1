"""What one reader of an answer is told of provisional tokens, whoever sent them."""

from dataclasses import replace

from colm.events import Event, ProvisionalToken, Token


class ProvisionalOnce:
    """Lets one provisional token through, before the first token, which then says what became of it.

    Each process holds to it towards its own reader, over all the nodes and calls that it reads from: after one that was
    lost, the next may send a provisional token again.

    Args:
        has_begun: the reader has tokens of the answer already.
    """

    def __init__(self, *, has_begun: bool = False) -> None:
        self._has_begun = has_begun
        self._token_id: int | None = None

    def see(self, event: Event) -> Event | None:
        """The event as the reader shall hear it; None if it shall not."""
        if isinstance(event, ProvisionalToken):
            if self._has_begun or self._token_id is not None:
                return None
            self._token_id = event.token_id
        elif isinstance(event, Token):
            is_first, self._has_begun = not self._has_begun, True
            is_same = None if not is_first or self._token_id is None else event.token_id == self._token_id
            if event.confirms_provisional != is_same:
                return replace(event, confirms_provisional=is_same)
        return event
