"""How often something that may fail is attempted, and how long the pauses are."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """A number of attempts, and the pause after a failure, which doubles each time."""

    max_attempts: int = 8
    first_pause_s: float = 0.25
    last_pause_s: float = 4.0

    def pause_s(self, num_failures: int) -> float | None:
        """Seconds to wait after so many failures in a row, at least one; None if that was the last attempt."""
        if num_failures >= self.max_attempts:
            return None
        return min(self.first_pause_s * 2.0 ** (num_failures - 1), self.last_pause_s)
