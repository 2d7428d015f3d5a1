"""docs/prefill.md: the comparison in tables, with where it was measured, beside what, and what was not run."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from bench import paper
from bench.harness.markdown import table
from bench.harness.units import digits, duration, length
from bench.prefill.record import AGREES_WITHIN, Bar, CellRecord
from bench.report.compare import OF_THE_FLOPS, Comparison, Found

HEAD = ("length", "paper", "ours", "ours / paper", "operations", "bar", "our time", "tokens/s", "measured")


def page(compared: Sequence[Comparison], found: Found, record_path: str, plots: Sequence[str]) -> str:
    """The whole page.

    Args:
        compared: all cells.
        found: the records behind them, all of one machine, commit and setting.
        record_path: of the records, as the page links it.
        plots: links of plots.
    """
    images = "".join(f"![{name.rpartition('/')[2].removesuffix('.svg')}]({name})\n" for name in plots)
    sections = [
        f"## {name}\n\n{_rows(list(cells))}" for name, cells in groupby(compared, key=lambda each: each.cell.preset)
    ]
    return f"""# Prefill: the paper's tables and ours

{_where(found.last)}
[Record]({record_path}); `python -m bench.report` writes this page from it.

A speed-up is the dense baseline's time over the row's, at the same length: the paper's on its A100, from
{paper.load().source};
ours on this machine, baseline and row in turns of one run. "Operations" is the baseline's count over the row's, for
chain 1 and without the last layer's attention and feed-forward. The bar is the smaller of the paper's speed-up and
{OF_THE_FLOPS} of that; of sparse attention it is the paper's speed-up. "met" or "missed" is ours against it.

"whole": all of it was run, median of its rounds (lowest .. highest). "sampled": tiles of one layer were timed and
summed, two standard errors to either side; what varies from one layer or minute to the next is not in them. Rows of
equal layers share such tiles, and differ in how many layers there are. "modelled": this machine's rates say so; never
compared. "wrong": the paper's figure is not used, `bench/paper/prefill_tables.json` says why. An empty cell was not
run.
{_sparse(found)}
{_summary(compared, found)}
{images}
{_samples(found)}
{_peers(found)}
{chr(10).join(sections)}"""


def _where(record: CellRecord) -> str:
    environment = record.environment
    dirty = ", with changes" if environment.get("dirty") else ""
    return (
        f"{environment.get('date', '')}, {environment.get('cpu')}, {environment.get('threads')} threads, "
        f"{record.dtype}, tiles of {length(record.tile_tokens)}, commit {str(environment.get('commit'))[:7]}{dirty}."
    )


def _sparse(found: Found) -> str:
    budgets = {record.sparse.keys_per_row for record in found.cells if record.sparse is not None}
    if not budgets:
        return "No sparse cell was run.\n"
    keys = " or ".join(f"{each:,}" for each in sorted(budgets))
    return (
        f'"sparse": the node\'s own planner gives each query row of a kv head {keys} keys at most; plans and audits\n'
        "are in the time. Random weights attend evenly, so nothing follows for quality, of which\n"
        "[quality.md](quality.md) has measurements.\n"
    )


def _summary(compared: Sequence[Comparison], found: Found) -> str:
    lines = []
    for attention, label in (("dense", "chained dense"), ("sparse", "sparse")):
        listed = [
            each
            for each in compared
            if each.cell.attention == attention and (attention == "sparse" or each.cell.kind != "baseline")
        ]
        judged = [each.is_met for each in listed if each.is_met is not None]
        of_tables = f"{len(listed)} are in the tables"
        lines.append(f"{sum(judged)} of {len(judged)} measured {label} cells reach the bar; {of_tables}.")
    counts = {how: sum(each.measured == how for each in found.cells) for how in ("whole", "sampled", "modelled")}
    lines.append("Of our cells " + ", ".join(f"{number} are {how}" for how, number in counts.items()) + ".")
    return "\n".join(lines) + "\n"


def _samples(found: Found) -> str:
    """What samples say against whole prefills of the same turns."""
    both = [each for each in found.cells if each.sample is not None and each.sample.off is not None]
    head = "## Samples against whole prefills\n\n"
    if not both:
        return f"{head}No cell ran both ways.\n"
    rows = []
    for num_tokens, listed in groupby(sorted(both, key=lambda each: each.num_tokens), key=lambda each: each.num_tokens):
        offs = [(each.sample.off, each.preset) for each in listed if each.sample and each.sample.off is not None]
        worst, preset = max(offs, key=lambda each: abs(each[0]))
        mean = sum(abs(off) for off, _ in offs) / len(offs)
        verdict = "yes" if abs(worst) <= AGREES_WITHIN else "no"
        rows.append([length(num_tokens), str(len(offs)), f"{mean:.1%}", f"{worst:+.1%}, {preset}", verdict])
    return f"{head}" + table(
        ("length", "cells", "off on average", "off at most", f"all within {AGREES_WITHIN:.0%}"), rows
    )


def _peers(found: Found) -> str:
    """Other software on the baseline's shape."""
    head = "## Beside other software\n\n"
    if not found.peers:
        return f"{head}None ran: peers take turns with rows that run whole.\n"
    presets = list(dict.fromkeys(name for each in found.peers for name in each.speedups))
    return (
        f"{head}The baseline's shape with random weights, a prompt read from nothing, in the same turns as our rows.\n"
        "A peer also computes the last layer's attention and feed-forward and one row of logits, which a prefill node\n"
        "leaves to the decode node. Under a preset: the peer's time over ours.\n\n"
        + table(("length", "peer", "its time", *presets), _peer_rows(found, presets))
    )


def _peer_rows(found: Found, presets: Sequence[str]) -> Iterator[list[str]]:
    for each in sorted(found.peers, key=lambda each: each.num_tokens):
        what = [length(each.num_tokens), f"{each.peer} {each.version}".strip()]
        if each.seconds is None:
            yield [*what, f"absent: {each.reason}", *("" for _ in presets)]
        else:
            yield [*what, duration(each.seconds.value), *(_bar(each.speedups[name]) for name in presets)]


def _rows(cells: Sequence[Comparison]) -> str:
    return table(HEAD, [_row(each) for each in cells])


def _row(each: Comparison) -> list[str]:
    ours = each.ours
    is_sparse = each.cell.attention == "sparse"
    speedup = "wrong" if each.paper_speedup is None else f"{digits(each.paper_speedup)}x"
    cells = [length(each.cell.num_tokens) + (", sparse" if is_sparse else ""), speedup]
    is_baseline = each.cell.kind == "baseline" and not is_sparse
    bar = "" if is_baseline or each.bar is None else f"{digits(each.bar)}x"
    operations = "" if each.flops_ratio is None else f"{digits(each.flops_ratio)}x"
    if ours is None:
        return [*cells, "", "", operations, bar, "", "", ""]
    met = "" if each.is_met is None else ", met" if each.is_met else ", missed"
    return [
        *cells,
        _bar(ours.over_baseline),
        "" if each.over_paper is None else digits(each.over_paper),
        operations,
        f"{bar}{met}",
        duration(ours.seconds.value),
        digits(ours.tokens_per_s),
        ours.measured,
    ]


def _bar(bar: Bar) -> str:
    if bar.low == bar.high:
        return f"{digits(bar.value)}x"
    return f"{digits(bar.value)}x ({digits(bar.low)} .. {digits(bar.high)})"
