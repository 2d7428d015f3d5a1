"""Reads a process's numbers where Prometheus reads them, and what happened between two readings."""

import http.client
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

_TIMEOUT_S = 2.0
_MAX_BYTES = 4 << 20

Key = tuple[str, frozenset[tuple[str, str]]]
"""A sample's name and labels."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """All samples of one process at one moment."""

    taken_s: float
    """On this machine's monotonic clock."""
    samples: Mapping[Key, float]

    @classmethod
    def parse(cls, text: str, taken_s: float) -> "Scrape":
        """From Prometheus' text format.

        Raises:
            ValueError: it is something else.
        """
        families = text_string_to_metric_families(text)
        samples = ((each.name, frozenset(each.labels.items()), each.value) for it in families for each in it.samples)
        return cls(taken_s, {(name, labels): value for name, labels, value in samples})


def scrape(address: str) -> Scrape | None:
    """Read the process whose metrics are at host:port; None where none can be read there."""
    connection = http.client.HTTPConnection(address, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            return None
        return Scrape.parse(response.read(_MAX_BYTES).decode(), time.monotonic())
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()


NOTHING = Scrape(0.0, {})
"""Of a process that cannot be read."""


@dataclass(frozen=True, slots=True)
class Window:
    """What a process counted between two readings of it."""

    before: Scrape
    after: Scrape

    def now(self, name: str, **labels: str) -> float | None:
        """The sum of the samples of the second reading that have these labels; None where there is none."""
        found = [self.after.samples[key] for key in self._found(name, labels)]
        return sum(found) if found else None

    def increase(self, name: str, **labels: str) -> float | None:
        """By how much a counter's samples with these labels grew; None where there are none, or with a new process."""
        grown = [self.after.samples[key] - self.before.samples.get(key, 0.0) for key in self._found(name, labels)]
        return sum(grown) if grown and min(grown) >= 0 else None

    def increases(self, name: str, label: str) -> dict[str, float]:
        """The same for each value of a label for which it grew."""
        values = dict.fromkeys(dict(labels)[label] for found, labels in self.after.samples if found == name)
        grown = {value: self.increase(name, **{label: value}) for value in values}
        return {value: each for value, each in grown.items() if each}

    def rate(self, name: str, **labels: str) -> float | None:
        """`increase`, each second."""
        seconds, grown = self.after.taken_s - self.before.taken_s, self.increase(name, **labels)
        return None if grown is None or seconds <= 0 else grown / seconds

    def _found(self, name: str, labels: Mapping[str, str]) -> list[Key]:
        wanted = labels.items()
        return [key for key in self.after.samples if key[0] == name and wanted <= dict(key[1]).items()]

    def quantile(self, name: str, share: float, **labels: str) -> float | None:
        """A quantile of what a histogram saw meanwhile, straight between its bounds; None where it saw nothing.

        Its series with these labels count as one. As Prometheus' `histogram_quantile`: beyond the last finite bound it
        is that bound.
        """
        buckets = []
        for le in {dict(found)["le"] for _, found in self._found(f"{name}_bucket", labels)}:
            count = self.increase(f"{name}_bucket", **labels, le=le)
            if count is None:
                return None
            buckets.append((float(le), count))
        buckets.sort()
        if not buckets or not buckets[-1][1]:
            return None
        wanted, lower, below = share * buckets[-1][1], 0.0, 0.0
        for bound, count in buckets:
            if count >= wanted and count > below:
                return lower if math.isinf(bound) else lower + (bound - lower) * (wanted - below) / (count - below)
            lower, below = bound, count
        return lower
