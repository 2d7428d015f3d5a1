"""A cluster at one moment, for a person who watches it: who is busy, how long the lines are, how fast it goes."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cluster.scrape import NOTHING, Scrape, Window, scrape
from colm.nodes import ClusterStatus, NodeReport, PoolStatus, Role

_MAX_READERS = 16
_UNREAD = Window(NOTHING, NOTHING)
_WELL = ("complete", "cancelled")
"""Outcomes that are no error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayView:
    """What clients get. Rates and times are of the time since the last look; None where nothing happened in it."""

    num_active: int
    num_waiting: int | None = None
    """Of these, requests without a token yet."""
    requests_per_s: float | None = None
    errors_per_s: float | None = None
    """Requests that ended in an error; those that clients cancelled are none."""
    errors: tuple[tuple[str, int], ...] = ()
    """How many ended with each error; of all models alone."""
    prompt_tokens_per_s: float | None = None
    new_tokens_per_s: float | None = None
    first_token_p50_s: float | None = None
    first_token_p95_s: float | None = None
    inter_token_p50_s: float | None = None
    inter_token_p95_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillView:
    """A prefill replica."""

    address: str
    num_active: int
    num_queued: int
    resident_bytes: int
    work_s: float | None = None
    """Engine time of all its prompts that is still to come, as estimated."""
    busy: float | None = None
    """Share of the time in which its engine computed."""
    tokens_per_s: float | None = None
    prefix_hits: float | None = None
    """Share of the prompt tokens that were kept from earlier prompts."""
    kv_bytes_per_s: float | None = None
    window_bytes: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeView:
    """A decode replica."""

    address: str
    model: str
    """That it serves."""
    num_active: int
    num_queued: int
    num_pages_used: int
    num_pages_total: int
    resident_bytes: int
    num_decoding: float | None = None
    prefix_hits: float | None = None
    """Share of the prompt tokens whose keys and values were in other requests' pages."""
    busy: float | None = None
    step_s: float | None = None
    """Of one step, on average."""
    tokens_per_s: float | None = None
    accepted: float | None = None
    """Share of chain 1's drafts that became tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterView:
    """All of it."""

    gateway: GatewayView
    models: dict[str, GatewayView]
    """The same for each model, by its name."""
    prefill: tuple[PrefillView, ...]
    decode: tuple[DecodeView, ...]
    pools: tuple[PoolStatus, ...]
    """Those whose size follows their load."""
    unread: tuple[str, ...]
    """Processes whose metrics cannot be read from here, by their gRPC address, or `gateway`."""


class Watch:
    """Looks at a cluster again and again; each view tells of the time since the one before.

    Args:
        status: asks the gateway.
        read: reads one process's metrics.
    """

    def __init__(self, status: Callable[[], ClusterStatus], read: Callable[[str], Scrape | None] = scrape) -> None:
        self._status = status
        self._read = read
        self._last: dict[str, Scrape] = {}

    def look(self) -> ClusterView:
        """The cluster now.

        Raises:
            ColmError: the gateway does not answer.
        """
        status = self._status()
        places = {"gateway": status.metrics_address}
        places |= {node.report.address: node.report.metrics_address for node in status.nodes}
        scrapes = self._read_all(places)
        windows = {name: Window(self._last.get(name, taken), taken) for name, taken in scrapes.items()}
        self._last = scrapes
        reports = [node.report for node in status.nodes]
        return ClusterView(
            gateway=_gateway(windows.get("gateway", _UNREAD), num_active=status.num_active_requests),
            models={model.name: _gateway(windows.get("gateway", _UNREAD), model=model.name) for model in status.models},
            prefill=tuple(_prefill(each, windows.get(each.address, _UNREAD)) for each in _of(reports, Role.PREFILL)),
            decode=tuple(
                _decode(each, status.model_of(each), windows.get(each.address, _UNREAD))
                for each in _of(reports, Role.DECODE)
            ),
            pools=status.pools,
            unread=tuple(name for name in places if name not in windows),
        )

    def _read_all(self, places: dict[str, str]) -> dict[str, Scrape]:
        readable = {name: address for name, address in places.items() if address}
        with ThreadPoolExecutor(_MAX_READERS) as threads:
            taken = zip(readable, threads.map(self._read, readable.values()), strict=True)
            return {name: each for name, each in taken if each is not None}


def _of(reports: Iterable[NodeReport], role: Role) -> list[NodeReport]:
    return sorted((each for each in reports if each.role is role), key=lambda each: each.address)


def _gateway(seen: Window, *, num_active: int | None = None, **model: str) -> GatewayView:
    """What clients get of all models, or of one; `num_active` where it is known better than by the metrics."""
    ended = seen.rate("colm_requests_ended_total", **model)
    well = sum(seen.rate("colm_requests_ended_total", outcome=outcome, **model) or 0.0 for outcome in _WELL)
    by_outcome = {} if model else seen.increases("colm_requests_ended_total", "outcome")
    waiting = seen.now("colm_requests_active", stage="waiting", **model)
    return GatewayView(
        num_active=round(seen.now("colm_requests_active", **model) or 0) if num_active is None else num_active,
        num_waiting=None if waiting is None else round(waiting),
        requests_per_s=ended,
        errors_per_s=None if ended is None else ended - well,
        errors=tuple((outcome, round(count)) for outcome, count in by_outcome.items() if outcome not in _WELL),
        prompt_tokens_per_s=seen.rate("colm_prompt_tokens_total", **model),
        new_tokens_per_s=seen.rate("colm_new_tokens_total", **model),
        first_token_p50_s=seen.quantile("colm_time_to_first_token_seconds", 0.5, **model),
        first_token_p95_s=seen.quantile("colm_time_to_first_token_seconds", 0.95, **model),
        inter_token_p50_s=seen.quantile("colm_inter_token_seconds", 0.5, **model),
        inter_token_p95_s=seen.quantile("colm_inter_token_seconds", 0.95, **model),
    )


def _prefill(report: NodeReport, seen: Window) -> PrefillView:
    return PrefillView(
        address=report.address,
        num_active=report.num_active_requests,
        num_queued=report.num_queued_requests,
        resident_bytes=report.process.resident_bytes,
        work_s=seen.now("colm_prefill_work_seconds"),
        busy=seen.rate("colm_prefill_engine_seconds_total"),
        tokens_per_s=seen.rate("colm_prefill_tokens_total"),
        prefix_hits=_ratio(
            seen.increase("colm_prefix_cache_hit_tokens_total"), seen.increase("colm_prefix_cache_queried_tokens_total")
        ),
        kv_bytes_per_s=seen.rate("colm_kv_bytes_total"),
        window_bytes=seen.now("colm_kv_window_bytes"),
    )


def _decode(report: NodeReport, model: str, seen: Window) -> DecodeView:
    steps_s = seen.increase("colm_decode_step_seconds_total")
    return DecodeView(
        address=report.address,
        model=model,
        num_active=report.num_active_requests,
        num_queued=report.num_queued_requests,
        num_pages_used=report.num_pages_used,
        num_pages_total=report.num_pages_total,
        resident_bytes=report.process.resident_bytes,
        num_decoding=seen.now("colm_decode_requests", stage="decoding"),
        prefix_hits=_ratio(
            seen.increase("colm_decode_prefix_hit_tokens_total"),
            seen.increase("colm_decode_prefix_query_tokens_total"),
        ),
        busy=seen.rate("colm_decode_step_seconds_total"),
        step_s=_ratio(steps_s, seen.increase("colm_decode_steps_total")),
        tokens_per_s=seen.rate("colm_decode_tokens_total"),
        accepted=_ratio(
            seen.increase("colm_decode_accepted_tokens_total"), seen.increase("colm_decode_draft_tokens_total")
        ),
    )


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
