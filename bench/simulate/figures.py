"""What came of a simulation, in figures."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from rich.console import Console
from rich.table import Table

from bench.harness.percentile import percentile
from bench.harness.units import digits, duration
from bench.simulate.cluster import Simulated


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Of one time over many requests; None where nobody had it."""

    mean: float | None
    p50: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Self:
        """Of those that are known."""
        known = [value for value in values if value is not None]
        if not known:
            return cls(mean=None, p50=None, p95=None, p99=None)
        p50, p95, p99 = (percentile(known, percent) for percent in (50, 95, 99))
        return cls(mean=sum(known) / len(known), p50=p50, p95=p95, p99=p99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Of a whole run."""

    num_requests: int
    num_refused: int
    seconds: float
    """Simulated, until the last answer ended."""
    new_tokens_per_s: float
    prompt_tokens_per_s: float
    ttft_s: Times
    """Of the requests that were served."""
    tpot_s: Times
    """A request's mean time per token after the first."""
    gap_s_p50: float | None
    """Between two tokens of an answer, over all tokens."""
    gap_s_p99: float | None
    prefill_busy: float
    decode_busy: float
    decode_batch: float
    page_use: float

    @classmethod
    def of(cls, simulated: Simulated) -> Self:
        """All of it."""
        served = [request for request in simulated.requests if not request.error]
        return cls(
            num_requests=len(simulated.requests),
            num_refused=len(simulated.requests) - len(served),
            seconds=simulated.seconds,
            new_tokens_per_s=sum(each.num_new_tokens for each in served) / simulated.seconds,
            prompt_tokens_per_s=sum(each.num_prompt_tokens for each in served) / simulated.seconds,
            ttft_s=Times.of(each.ttft_s for each in served),
            tpot_s=Times.of(each.tpot_s for each in served),
            gap_s_p50=simulated.gaps.percentile(50),
            gap_s_p99=simulated.gaps.percentile(99),
            prefill_busy=simulated.prefill_busy,
            decode_busy=simulated.decode_busy,
            decode_batch=simulated.decode_batch,
            page_use=simulated.page_use,
        )


def print_figures(out: Console, figures: Figures) -> None:
    """A table of times, and a line of the rest."""
    table = Table("simulated", "mean", "p50", "p95", "p99")
    for name, times in (("time to first token", figures.ttft_s), ("time per token", figures.tpot_s)):
        values = times.mean, times.p50, times.p95, times.p99
        table.add_row(name, *("-" if value is None else duration(value) for value in values))
    out.print(table)
    out.print(
        f"{figures.num_requests:,} requests in {duration(figures.seconds)}, {figures.num_refused:,} refused; "
        f"{digits(figures.new_tokens_per_s)} new tokens/s, {digits(figures.prompt_tokens_per_s)} prompt tokens/s; "
        f"busy: prefill {figures.prefill_busy:.0%}, decode {figures.decode_busy:.0%} with "
        f"{digits(figures.decode_batch)} answers a step; pages {figures.page_use:.0%}"
    )
