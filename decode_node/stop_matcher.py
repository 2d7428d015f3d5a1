"""Ends an answer before a stop string, and holds back text that may become one."""

from collections.abc import Sequence


class StopMatcher:
    """Feed text piece by piece; what comes out is safe to show."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that can no longer belong to a stop string; sets `stopped` where one has appeared."""
        pending = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := pending.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            # The one that is complete first: with one token at a time the others would never have been seen.
            return pending[: min(found)[1]]
        held = max((_overlap(pending, stop) for stop in self._stops), default=0)
        self._held = pending[len(pending) - held :]
        return pending[: len(pending) - held]

    def flush(self) -> str:
        """What was held back, once it is sure that no text follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-size:])), 0)
