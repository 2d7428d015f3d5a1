"""Time, injected: a deadline is an absolute monotonic time, and only this file compares it with now."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol


def utc_now() -> datetime:
    """The date and time, for what is compared with dates: deadlines use a `Clock`."""
    return datetime.now(UTC)


class Clock(Protocol):
    """Source of monotonic time in seconds."""

    def now(self) -> float:
        """Seconds since an arbitrary fixed point; never goes back."""


class MonotonicClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """Seconds since an arbitrary fixed point."""
        return time.monotonic()


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on a clock after which nobody waits for the answer any more."""

    clock: Clock
    at_s: float

    @classmethod
    def after(cls, clock: Clock, timeout_s: float) -> "Deadline":
        """The moment `timeout_s` from now."""
        return cls(clock, clock.now() + timeout_s)

    def remaining_s(self) -> float:
        """Seconds left; zero once it has passed."""
        return max(0.0, self.at_s - self.clock.now())
