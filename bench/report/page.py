"""docs/prefill.md: the comparison in tables, with where it was measured and what was not run."""

from collections.abc import Sequence
from itertools import groupby

from bench import paper
from bench.harness.markdown import table
from bench.harness.units import digits, duration, length
from bench.prefill.record import Bar, CellRecord
from bench.report.compare import OF_THE_FLOPS, Comparison

HEAD = ("length", "paper", "ours", "ours / paper", "operations", "bar", "our time", "tokens/s", "measured")


def page(compared: Sequence[Comparison], found: Sequence[CellRecord], record_path: str, plots: Sequence[str]) -> str:
    """The whole page.

    Args:
        compared: all dense cells.
        found: the records behind them, all of one machine, commit and setting.
        record_path: of the records, as the page links it.
        plots: links of plots.
    """
    images = "".join(f"![{name.rpartition('/')[2].removesuffix('.svg')}]({name})\n" for name in plots)
    sections = [
        f"## {name}\n\n{_rows(list(cells))}" for name, cells in groupby(compared, key=lambda each: each.cell.preset)
    ]
    return f"""# Prefill: the paper's tables and ours

{_where(found[-1])}
[Record]({record_path}); `python -m bench.report` writes this page from it.

A speed-up is the dense baseline's time over the row's, at the same length: the paper's on its A100, from
{paper.load().source};
ours on this machine, baseline and row in turns of one run. "Operations" is the baseline's count over the row's, for
chain 1 and without the last layer's attention and feed-forward. The bar is the smaller of the paper's speed-up and
{OF_THE_FLOPS} of that; "met" or "missed" is ours against it.

"whole": all of it was run, median of its rounds (lowest .. highest). "sampled": tiles of one layer were timed and
summed, two standard errors to either side; what varies from one layer or minute to the next is not in them.
"modelled": this machine's rates say so; never compared. "wrong": the paper's figure is not used,
`bench/paper/prefill_tables.json` says why. An empty cell was not run. The tables' sparse cells are not part of this.

{_summary(compared, found)}
{images}
{chr(10).join(sections)}"""


def _where(record: CellRecord) -> str:
    environment = record.environment
    dirty = ", with changes" if environment.get("dirty") else ""
    return (
        f"{environment.get('date', '')}, {environment.get('cpu')}, {environment.get('threads')} threads, "
        f"{record.dtype}, tiles of {length(record.tile_tokens)}, commit {str(environment.get('commit'))[:7]}{dirty}."
    )


def _summary(compared: Sequence[Comparison], found: Sequence[CellRecord]) -> str:
    chained = [each for each in compared if each.cell.preset != each.cell.baseline]
    judged = [each.is_met for each in compared if each.is_met is not None]
    offs = [
        abs(each.sample.seconds.value / each.seconds.value - 1)
        for each in found
        if each.measured == "whole" and each.sample is not None
    ]
    lines = [f"{sum(judged)} of {len(judged)} measured chained cells reach the bar; {len(chained)} are in the tables."]
    if offs:
        lines.append(
            f"Where both ran, samples are {max(offs):.1%} off the whole at most, {sum(offs) / len(offs):.1%} on "
            f"average ({len(offs)} cells)."
        )
    return "\n".join(lines) + "\n"


def _rows(cells: Sequence[Comparison]) -> str:
    return table(HEAD, [_row(each) for each in cells])


def _row(each: Comparison) -> list[str]:
    ours = each.ours
    speedup = "wrong" if each.cell.suspect else f"{digits(each.paper_speedup or 1.0)}x"
    cells = [length(each.cell.num_tokens), speedup]
    bar = "" if each.cell.kind == "baseline" else f"{digits(each.bar)}x"
    if ours is None:
        return [*cells, "", "", f"{digits(each.flops_ratio)}x", bar, "", "", ""]
    met = "" if each.is_met is None else ", met" if each.is_met else ", missed"
    return [
        *cells,
        _bar(ours.over_baseline),
        "" if each.over_paper is None else digits(each.over_paper),
        f"{digits(each.flops_ratio)}x",
        f"{bar}{met}",
        duration(ours.seconds.value),
        digits(ours.tokens_per_s),
        ours.measured,
    ]


def _bar(bar: Bar) -> str:
    if bar.low == bar.high:
        return f"{digits(bar.value)}x"
    return f"{digits(bar.value)}x ({digits(bar.low)} .. {digits(bar.high)})"
