"""Ctrl-C and the other signals that ask a process to end, as one KeyboardInterrupt."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Within the block such a signal raises KeyboardInterrupt, the first time only: no later one breaks a clean-up off.

    Only for the main thread. A block that KeyboardInterrupt leaves takes the process with it: it stays deaf until then.
    """

    def __init__(self) -> None:
        self.deaf = False
        """Set it where a clean-up begins: from there on nothing is raised."""
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
        """Be deaf from here on, if nothing came so far.

        Raises:
            KeyboardInterrupt: a signal came, and what it raised was lost, as it is in a finalizer.
        """
        self.deaf = True
        if self._came:
            raise KeyboardInterrupt

    def _hear(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a handler's arguments
        self._came = True
        if not self.deaf:
            self.deaf = True
            raise KeyboardInterrupt
