"""Turns SIGINT, SIGTERM and SIGHUP into one KeyboardInterrupt."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Raises KeyboardInterrupt in the block at the first signal. Later ones are ignored, so a clean-up runs to its end.

    Only for the main thread. After a block that ends with KeyboardInterrupt, signals stay ignored until the process
    ends; after any other block the earlier handlers are back.
    """

    def __init__(self) -> None:
        self.deaf = False
        """While true, signals raise nothing. Set it where a clean-up begins."""
        self._came = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def finish(self) -> None:
        """Ignore signals from here on; raise now if one came before.

        Raises:
            KeyboardInterrupt: a signal came, and its own KeyboardInterrupt was lost, e.g. in a finalizer.
        """
        self.deaf = True
        if self._came:
            raise KeyboardInterrupt

    def _hear(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a handler's arguments
        self._came = True
        if not self.deaf:
            self.deaf = True
            raise KeyboardInterrupt
