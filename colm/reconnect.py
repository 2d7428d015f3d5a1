"""One request of a client over all the calls that it takes: which is the next one, and what they have brought."""

import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace

from colm.clock import Clock, Deadline, MonotonicClock
from colm.errors import (
    CallDropped,
    CapacityExceeded,
    ColmError,
    ConnectionLost,
    DeadlineExceeded,
    GoingAway,
    PeerUnavailable,
    PrefillUnavailable,
    UnknownAnswer,
)
from colm.events import Accepted, Event, Reconnecting, Token
from colm.provisional import ProvisionalOnce
from colm.retry import RetryPolicy
from colm.scale import Changing, ScaleWish
from colm.upload import Change, Document, GenerateOptions, Message, Resume, Upload

RECONNECT = RetryPolicy(max_attempts=40, first_pause_s=0.05, last_pause_s=1.0)
"""For calls in a row that bring no token; they last longer than a gateway needs to start again."""
# The call's deadline lies this long after the server's own, whose error message says where the time went.
_DEADLINE_SLACK_S = 5.0
# gRPC counts nanoseconds in 64 bits; a deadline that overflows them is over at once.
_LONGEST_CALL_S = 1e9


@dataclass(slots=True)
class KnownGateway:
    """What a client has learnt of its gateway, by all its calls."""

    was_there: bool = False
    """It was reached once, so it may be there again."""


class Attempts:
    """A request that survives its gateway.

    The first call submits it. When that breaks, the next one asks for the rest of the answer, which a decode node holds
    for a while. If it is held nowhere any more, the request is submitted again, with the answer so far.

    Raises:
        InvalidRequest: names the field at fault. The cluster checks its own limits.
    """

    def __init__(
        self,
        document: Document,
        prompt: str,
        options: GenerateOptions,
        *,
        scale: Changing[ScaleWish | None],
        reconnects: bool,
        gateway: KnownGateway,
        clock: Clock | None = None,
        retry: RetryPolicy = RECONNECT,
    ) -> None:
        self._upload = Upload.of(document, prompt, options)
        self.scale = scale
        """What the caller has asked for since; None until then."""
        self._reconnects = reconnects
        self._gateway = gateway
        self._clock = clock or MonotonicClock()
        self._retry = retry
        timeout_s = self._upload.request.timeout_s
        self._deadline = None if timeout_s is None else Deadline.after(self._clock, timeout_s)
        self._token_ids: list[int] = []
        self._provisional = ProvisionalOnce()
        self._revision = ""
        """Of the weights that those are of."""
        self._num_failures = 0
        self._is_accepted = False
        self._was_accepted = False
        """By any call; the caller hears it once."""
        self._was_lost = False
        self._resumes = False
        if reconnects:
            self._upload.request = replace(self._upload.request, answer_key=secrets.token_hex(16))

    @property
    def call_timeout_s(self) -> float | None:
        """Seconds that the next call may take; None for any number."""
        if self._deadline is None or (remaining_s := self._deadline.remaining_s()) <= 0:
            return None  # the gateway says what is wrong with it
        return min(remaining_s + _DEADLINE_SLACK_S, _LONGEST_CALL_S)

    @property
    def messages(self) -> Iterator[Message]:
        """What the next call begins with; changes of scale follow."""
        key = self._upload.request.answer_key
        yield from Resume(answer_key=key, num_tokens=len(self._token_ids)) if self._resumes else self._upload
        yield from self.change  # whoever was told of it may be lost

    @property
    def change(self) -> Change:
        """What asks for the scale that the caller has last asked for."""
        return Change(self.scale.value)

    def errors(self) -> AbstractContextManager[None]:
        """See `Upload.errors`."""
        return self._upload.errors()

    def see(self, heard: Event) -> Event | None:
        """Note an event; returns it as the caller shall have it, or None if that is no news."""
        self._gateway.was_there = True
        if (event := self._provisional.see(heard)) is None:
            return None
        if isinstance(event, Accepted):
            if not self._token_ids:
                self._revision = event.revision
            if self._deadline is None and event.timeout_s > 0:
                self._deadline = Deadline.after(self._clock, event.timeout_s)
            is_news, self._is_accepted, self._was_accepted = not self._was_accepted, True, True
            return event if is_news else None
        if isinstance(event, Token):
            self._token_ids.append(event.token_id)
            self._num_failures = 0
        return event

    def after(self, error: ColmError) -> Reconnecting:
        """Prepare the next call after one that failed.

        Raises:
            ColmError: the error; another call would not help.
            DeadlineExceeded: another call would, but the request's time is over.
        """
        self._gateway.was_there |= self._upload.is_taken or isinstance(error, GoingAway | CallDropped)
        self._num_failures += 1
        pause_s = self._retry.pause_s(self._num_failures)
        if not self._reconnects or pause_s is None or not self._helps(error):
            raise error
        if self._deadline is not None and self._deadline.remaining_s() <= 0:
            raise DeadlineExceeded(f"the request's time is over, and its gateway is not back: {error}") from error
        if isinstance(error, ConnectionLost):
            self._was_lost = True
            self._resumes = self._is_accepted
        elif not isinstance(error, CapacityExceeded):  # whoever held the answer has it no more
            self._resumes = False
        if not self._resumes:
            self._submit_again(error)
        return Reconnecting(in_s=pause_s, cause=str(error))

    def _helps(self, error: ColmError) -> bool:
        match error:
            case PrefillUnavailable():
                return False
            case ConnectionLost():
                return self._gateway.was_there
            case UnknownAnswer() | PeerUnavailable():
                return self._resumes  # of a submitted request it is the gateway's last word
            case CapacityExceeded():
                return self._was_lost  # others that lost the same gateway may be there first
            case _:
                return False

    def _submit_again(self, error: ColmError) -> None:
        remaining_s = None if self._deadline is None else self._deadline.remaining_s()
        request = replace(
            self._upload.request,
            timeout_s=remaining_s,
            answer_key=secrets.token_hex(16),
            answer_token_ids=tuple(self._token_ids),
            revision=self._revision if self._token_ids else "",
            **({} if self.scale.value is None else asdict(self.scale.value)),
        )
        if (upload := self._upload.again(request)) is None:
            raise error
        self._upload, self._is_accepted = upload, False
