"""Plots of the comparison, as SVG on a light ground of their own, so that they are legible on any page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench.harness.units import length
from bench.prefill.record import CellRecord
from bench.report.compare import Comparison, Found

PAPER, OURS, ALLOWED, INK, GROUND = "#b3531d", "#1f5fa8", "#8a8a8a", "#222222", "#fbfbf9"
_LINES: Final = ("#222222", "#1f5fa8", "#b3531d", "#2e7d4f", "#8a4fa3", "#a3822a", "#3d8f9b")
_FILLS: Final = {"whole": "full", "sampled": "none", "modelled": "none"}
_MARKS: Final = {"whole": "o", "sampled": "o", "modelled": "x"}
_SPARSE_MARK: Final = "^"
"""In place of the circle."""
_DASHES: Final = {"dense": "-", "sparse": "--"}


def write(compared: Sequence[Comparison], found: Found, folder: Path, suffix: str = ".svg") -> list[Path]:
    """Two plots a family: speed-up against length for each configuration, and tokens a second against length.

    Raises:
        ImportError: matplotlib is not there; the message says how it is installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as err:
        raise ImportError("plots need matplotlib: pip install 'colm-serve[bench]'") from err
    mpl.use("svg" if suffix == ".svg" else "agg")
    style = {"svg.hashsalt": "colm", "svg.fonttype": "path", "font.size": 9, "text.color": INK, "axes.edgecolor": INK}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(style):
        for family in dict.fromkeys(each.cell.baseline for each in compared):
            cells = [each for each in compared if each.cell.baseline == family]
            if not any(each.ours for each in cells):
                continue
            source = _source(found.last)
            for name, draw in (("speedup", _speedups), ("tokens", _rates)):
                path = folder / f"prefill-{name}-{family}{suffix}"
                figure = draw(cells, family, source)
                figure.savefig(path, facecolor=GROUND, dpi=110, metadata={"Date": None} if suffix == ".svg" else None)
                written.append(path)
    return written


def _source(record: CellRecord) -> str:
    environment = record.environment
    return (
        f"Ours: {environment.get('cpu')}, {environment.get('threads')} threads, {record.dtype}, "
        f"commit {str(environment.get('commit'))[:7]}. Paper: arXiv 2505.11820v2, Tables 10-13, one A100."
    )


def _figure(**size: Any) -> Any:
    from matplotlib.figure import Figure  # pyplot would keep every figure

    return Figure(layout="constrained", **size)


def _speedups(cells: Sequence[Comparison], family: str, source: str) -> Any:
    names = [name for name in dict.fromkeys(each.cell.preset for each in cells) if name != family]
    figure = _figure(figsize=(9.5, 6.2))
    axes = figure.subplots(2, -(-len(names) // 2), sharex=True, sharey=True, squeeze=False)
    for ax in axes[-1]:
        ax.set_xlabel("prompt tokens")
    for ax, name in zip(axes.flat, names, strict=False):
        for attention, dashes in _DASHES.items():
            row = [each for each in cells if each.cell.preset == name and each.cell.attention == attention]
            right = [each for each in row if each.paper_speedup is not None]
            ax.plot(
                *_points(right, "paper_speedup"),
                color=PAPER,
                marker="s" if attention == "dense" else _SPARSE_MARK,
                markersize=3.5,
                linewidth=1.2,
                linestyle=dashes,
            )
            allowed = [each for each in row if each.flops_ratio is not None]
            ax.plot(*_points(allowed, "flops_ratio"), color=ALLOWED, linestyle=":", linewidth=1.2)
            _ours(ax, [each.ours for each in row if each.ours], "over_baseline", OURS)
        _dress(ax, name.removeprefix(f"{family}-").replace("-air", " air").replace("-same-params", ", same parameters"))
    figure.supylabel("times the baseline's speed", fontsize=9)
    figure.suptitle(f"{family}: prefill speed-up over the dense baseline, by prompt length\n{source}", fontsize=9)
    figure.legend(handles=_legend(with_paper=True), loc="outside lower center", ncols=6, frameon=False)
    return figure


def _rates(cells: Sequence[Comparison], family: str, source: str) -> Any:
    figure = _figure(figsize=(9.5, 5.2))
    ax = figure.subplots()
    for color, name in zip(_LINES, dict.fromkeys(each.cell.preset for each in cells), strict=True):
        row = [each.ours for each in cells if each.cell.preset == name and each.ours]
        for attention in _DASHES:
            _ours(ax, [each for each in row if each.attention == attention], None, color)
        ax.plot([], [], color=color, label=name)
    _dress(ax, "", base=10)
    figure.suptitle(f"{family}: prompt tokens per second, by prompt length\n{source}", fontsize=9)
    ax.set_ylabel("tokens/s")
    ax.set_xlabel("prompt tokens")
    ax.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.legend(handles=_legend(with_paper=False), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _points(cells: Sequence[Comparison], what: str) -> tuple[list[int], list[float]]:
    return [each.cell.num_tokens for each in cells], [getattr(each, what) for each in cells]


def _ours(ax: Any, found: Sequence[CellRecord], bar: str | None, color: str) -> None:
    """Measured cells are joined; modelled ones stand alone."""
    measured = [each for each in found if each.measured != "modelled"]
    ax.plot(
        [each.num_tokens for each in measured],
        [_value(each, bar) for each in measured],
        color=color,
        linewidth=1.2,
        linestyle=_DASHES[found[0].attention] if found else "-",
    )
    for each in found:
        if bar is None:
            low, high = each.num_tokens / each.seconds.high, each.num_tokens / max(each.seconds.low, 1e-12)
        else:
            low, high = each.over_baseline.low, each.over_baseline.high
        value = _value(each, bar)
        ax.errorbar(
            [each.num_tokens],
            [value],
            yerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
            color=color,
            marker=_mark(each),
            markerfacecolor=color if each.measured == "whole" else GROUND,
            markersize=4.5,
            elinewidth=1,
            capsize=2,
        )


def _mark(record: CellRecord) -> str:
    is_measured = record.measured != "modelled"
    return _SPARSE_MARK if is_measured and record.attention == "sparse" else _MARKS[record.measured]


def _value(record: CellRecord, bar: str | None) -> float:
    return record.tokens_per_s if bar is None else record.over_baseline.value


def _dress(ax: Any, title: str, *, base: int = 2) -> None:
    ax.set_title(title, fontsize=9)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=base)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1000 else f"{value:,.0f}")
    lengths = [2 << power for power in range(10, 20, 3)]
    ax.set_xticks(lengths, [length(each) for each in lengths])
    ax.set_xlim(2048 / 1.3, (1 << 20) * 1.3)
    ax.set_facecolor(GROUND)
    ax.grid(visible=True, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)


def _legend(*, with_paper: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    color = OURS if with_paper else INK
    ours = [
        Line2D(
            [], [], color=color, marker=_MARKS[how], fillstyle=_FILLS[how], markersize=4.5, linestyle="", label=label
        )
        for how, label in (("whole", "ours, whole"), ("sampled", "ours, sampled"), ("modelled", "ours, modelled"))
    ]
    ours.append(
        Line2D([], [], color=INK, marker=_SPARSE_MARK, markersize=4.5, linestyle="--", label="sparse attention")
    )
    if not with_paper:
        return ours
    return [
        Line2D([], [], color=PAPER, marker="s", markersize=3.5, label="paper"),
        *ours,
        Line2D([], [], color=ALLOWED, linestyle=":", label="operations allow"),
    ]
