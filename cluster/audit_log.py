"""The audit log: who asked for how much, and what came of it. Sizes, never content; a file for each day."""

import json
import logging
import os
import re
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(\d{4}-\d{2}-\d{2})\.jsonl")


class AuditLog:
    """Appends a line of JSON for each request to the day's file, and deletes files that are too old.

    A line that cannot be written is lost, with a line in the gateway's log: no request waits or fails for it.

    Args:
        folder: of the files; made if it is not there, for this user alone.
        keep_days: how many days are kept, today included; at least 1.
        now: the time, with its zone.
    """

    def __init__(
        self, folder: Path, *, keep_days: int, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._folder = folder
        self._keep_days = keep_days
        self._now = now
        self._today: date | None = None

    def write(self, **facts: str | int | float) -> None:
        """Append a line with the time and these facts."""
        now = self._now()
        line = json.dumps({"time": now.isoformat(timespec="milliseconds"), **facts}) + "\n"
        try:
            if now.date() != self._today:
                self._begin(now.date())
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            with os.fdopen(os.open(self._folder / f"{now.date()}.jsonl", flags, 0o600), "a") as file:
                file.write(line)
        except OSError as err:
            logger.error("audit.lost error=%s", err)

    def _begin(self, today: date) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._today = today
        oldest = today - timedelta(days=self._keep_days - 1)
        for path in self._folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and match[1] < oldest.isoformat():
                path.unlink(missing_ok=True)
