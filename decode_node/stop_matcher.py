"""Ends an answer before a stop string, and holds back text that may become one."""

from collections.abc import Sequence


class StopMatcher:
    """Takes text piece by piece, and returns what is safe to show."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text, and return what can no longer belong to a stop string; sets `stopped` once one has appeared."""
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
        """Return what was held back; to be called when no more text follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-size:])), 0)
