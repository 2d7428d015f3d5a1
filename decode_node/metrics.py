"""What a decode node shows to Prometheus beside its KV streams, looked up whenever it is asked."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from decode_node.decode_loop import DecodeLoop
from decode_node.held_answers import HeldAnswers
from decode_node.kv_layout import KvLayout
from decode_node.page_line import PageLine
from decode_node.provisional import ProvisionalOutcome
from decode_node.requests import RequestOwner, Stage

_NOW = {Stage.WAITING: "waiting", Stage.PREFILLING: "prefilling", Stage.DECODING: "decoding"}
_ENDS = {Stage.FINISHED: "finished", Stage.FAILED: "failed", Stage.CANCELLED: "cancelled"}


class DecodeMetrics(Collector):
    """Reads the node's own counts; must be collected on the node's event loop."""

    def __init__(
        self,
        owner: RequestOwner,
        answers: HeldAnswers,
        loop: DecodeLoop,
        page_line: PageLine,
        layout: KvLayout,
        registry: CollectorRegistry,
    ) -> None:
        self._owner = owner
        self._answers = answers
        self._loop = loop
        self._pool, self._cache = page_line.pool, page_line.cache
        self._layout = layout
        registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Requests, held answers, pages, and steps."""
        stages, counts = self._owner.stages(), self._loop.counts
        requests = GaugeMetricFamily("colm_decode_requests", "Requests on this node, by their stage.", labels=["stage"])
        for stage, name in _NOW.items():
            requests.add_metric([name], stages[stage])
        yield requests
        ended = CounterMetricFamily(
            "colm_decode_requests_ended", "Requests that have ended, by how they did.", labels=["outcome"]
        )
        for stage, name in _ENDS.items():
            ended.add_metric([name], self._owner.ended[stage])
        yield ended
        held = self._answers.counts
        yield GaugeMetricFamily(
            "colm_decode_answers_held",
            "Answers without a reader, held for one to come.",
            self._answers.num_without_reader,
        )
        yield CounterMetricFamily(
            "colm_decode_answers_orphaned", "Readers that were lost to an answer which is held.", held.num_orphaned
        )
        yield CounterMetricFamily("colm_decode_answers_resumed", "Calls that took an answer up.", held.num_resumed)
        yield CounterMetricFamily(
            "colm_decode_answers_expired", "Held answers for which nobody came in time.", held.num_expired
        )
        pages = GaugeMetricFamily("colm_decode_pages", "Pages of the KV pool, by their state.", labels=["state"])
        pages.add_metric(["used"], self._pool.num_used)
        pages.add_metric(["cached"], self._pool.num_idle)
        pages.add_metric(["free"], self._pool.num_free)
        yield pages
        page_bytes = GaugeMetricFamily("colm_decode_page_bytes", "Bytes of a page of the KV pool.", labels=["format"])
        page_bytes.add_metric([self._layout.page_format], self._layout.page_bytes)
        yield page_bytes
        yield CounterMetricFamily(
            "colm_decode_pages_evicted",
            "Cached pages that gave way to a reservation, or to others.",
            self._cache.num_evicted_pages,
        )
        prefix = self._owner.prefix
        yield CounterMetricFamily(
            "colm_decode_prefix_query_tokens",
            "Prompt tokens whose keys and values were looked for in the pages of other requests.",
            prefix.num_query_tokens,
        )
        yield CounterMetricFamily(
            "colm_decode_prefix_hit_tokens", "Of those, tokens that were found.", prefix.num_hit_tokens
        )
        yield GaugeMetricFamily(
            "colm_decode_step_budget_tokens",
            "Tokens that a step reads in which one answer goes on.",
            self._loop.budget.step_tokens,
        )
        yield CounterMetricFamily("colm_decode_steps", "Steps of the decode engine.", counts.num_steps)
        yield CounterMetricFamily("colm_decode_step_seconds", "Time in which steps ran.", counts.steps_s)
        tokens = CounterMetricFamily(
            "colm_decode_tokens", "Tokens sampled for answers, by their scale.", labels=["num_chains"]
        )
        for num_chains, num_tokens in sorted(counts.num_tokens.items()):
            tokens.add_metric([str(num_chains)], num_tokens)
        yield tokens
        yield GaugeMetricFamily(
            "colm_decode_auto_chains", "Most chains of answers that leave it to this node.", self._loop.auto_scale.level
        )
        provisional = CounterMetricFamily(
            "colm_decode_provisional_tokens",
            "Provisional first tokens that prefill nodes were asked for, by what became of them.",
            labels=["outcome"],
        )
        for outcome in ProvisionalOutcome:
            provisional.add_metric([outcome.value], self._owner.provisional[outcome])
        yield provisional
        yield CounterMetricFamily(
            "colm_decode_draft_tokens", "Tokens drafted by chain 1 and verified.", counts.num_draft_tokens
        )
        yield CounterMetricFamily(
            "colm_decode_accepted_tokens", "Drafts that became tokens of answers.", counts.num_accepted_tokens
        )
