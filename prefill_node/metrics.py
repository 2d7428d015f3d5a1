"""What a prefill node's loop shows to Prometheus, looked up whenever it is asked."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from prefill_node.prefill_loop import PrefillLoop
from prefill_node.prefix_uplink import OUTCOMES


class PrefillMetrics(Collector):
    """Reads the loop's own counts; must be collected on the loop's event loop."""

    def __init__(self, loop: PrefillLoop, registry: CollectorRegistry) -> None:
        self._loop = loop
        registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Jobs, the work that waits, the window, and the time that readers and forgotten jobs cost."""
        loop, prefixes = self._loop, self._loop.prefixes
        load, counts = loop.load, loop.counts
        jobs = GaugeMetricFamily("colm_prefill_jobs", "Prompts on this node, by their state.", labels=["state"])
        jobs.add_metric(["active"], load.num_active)
        jobs.add_metric(["queued"], load.num_queued)
        yield jobs
        yield GaugeMetricFamily(
            "colm_prefill_work_seconds", "Engine time of all prompts on this node, as estimated.", load.remaining_s
        )
        yield GaugeMetricFamily(
            "colm_kv_window_bytes", "Computed tiles that no decode node has acknowledged.", load.window_bytes
        )
        yield CounterMetricFamily(
            "colm_prefill_tokens", "Tokens computed of prompts whose last tile is there.", counts.num_tokens
        )
        yield CounterMetricFamily(
            "colm_prefill_engine_seconds", "Time in which the engine made steps.", counts.engine_s
        )
        yield CounterMetricFamily(
            "colm_kv_reader_wait_seconds",
            "Time in which the engine stood still since windows were full.",
            counts.reader_wait_s,
        )
        yield CounterMetricFamily(
            "colm_kv_leases_expired", "Prompts forgotten since no stream came back for them.", counts.num_leases_expired
        )
        yield GaugeMetricFamily(
            "colm_prefix_cache_bytes", "Keys and values that are kept for later prompts.", prefixes.held_bytes
        )
        yield CounterMetricFamily(
            "colm_prefix_cache_queried_tokens",
            "Tokens of prompts that were looked up as they began.",
            prefixes.counts.num_queried_tokens,
        )
        yield CounterMetricFamily(
            "colm_prefix_cache_hit_tokens",
            "Of those, tokens that need not be computed.",
            prefixes.counts.num_hit_tokens,
        )
        yield CounterMetricFamily(
            "colm_prefix_cache_evicted_tiles",
            "Tiles that made way for those of later prompts.",
            prefixes.counts.num_evicted_tiles,
        )
        up = loop.uplinks.counts
        yield CounterMetricFamily(
            "colm_prefix_uplink_bytes", "Keys and values that came up from decode nodes.", up.num_bytes
        )
        yield CounterMetricFamily(
            "colm_prefix_uplink_tokens",
            "Tokens of prompts that were not computed since their keys and values came up.",
            up.num_tokens,
        )
        uplinks = CounterMetricFamily(
            "colm_prefix_uplinks_ended", "Beginnings of prompts that were asked for, by what came.", labels=["outcome"]
        )
        for outcome in OUTCOMES:
            uplinks.add_metric([outcome], up.ended[outcome])
        yield uplinks
