"""The rows as a figure: a column for each kind of arrivals, times and goodput against the rate."""

import textwrap
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from bench.serving.outcome import Percentiles, Summary
from bench.serving.report import Row
from bench.serving.systems import NAMES, Name
from bench.serving.trace import PATTERNS
from colm.errors import ConfigError

_COLOURS: Final[dict[Name, str]] = {"disaggregated": "#1f5fa8", "one process": "#b3531d"}
_GROUND: Final = "#fbfbf9"
_TITLES: Final = {"poisson": "Poisson arrivals"}
_LABELS: Final = (
    "time to the first token, s",
    "time per token after the first, ms",
    "goodput: requests a second\nthat met the objective",
)


def check_plots() -> None:
    """See that plots can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib, the extra `bench`; `make setup` installs it")


def write_plot(path: Path, found: Sequence[Row], source: str) -> None:
    """Draw the rows, as the path's suffix says, on a light ground of their own.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check_plots()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    patterns = [each for each in PATTERNS if any(row.pattern == each for row in found)]
    style = {"svg.hashsalt": "colm", "svg.fonttype": "path", "font.size": 9}
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.2 * len(patterns) + 0.8, 8.4), facecolor=_GROUND, layout="constrained")
        axes = figure.subplots(3, len(patterns), squeeze=False, sharex=True, sharey="row")
        for column, pattern in enumerate(patterns):
            of_pattern = [row for row in found if row.pattern == pattern]
            axes[0][column].set_title(_TITLES.get(of_pattern[0].arrivals, of_pattern[0].arrivals), fontsize=10)
            for name in NAMES:
                mine = [row for row in of_pattern if row.system == name]
                _times(axes[0][column], mine, lambda each: each.ttft_s)
                _times(axes[1][column], mine, lambda each: each.tpot_s, scale=1e3)
                goodput = [(row.rate_per_s, row.summary.goodput_per_s) for row in mine]
                _line(axes[2][column], mine, goodput, marker="o")
            rates = sorted({row.rate_per_s for row in of_pattern})
            axes[2][column].plot(rates, rates, color="#8a8a8a", linestyle=":", linewidth=1, label="offered")
            axes[2][column].set_xlabel("requests a second")
            axes[2][column].set_xticks(rates, [f"{rate:g}" for rate in rates])
        for row_of_axes in axes:
            for axis in row_of_axes:
                axis.grid(visible=True, color="#dddddd", linewidth=0.6)
                axis.set_axisbelow(True)
                axis.set_ylim(bottom=0)
                axis.set_facecolor(_GROUND)
        for axis, label in zip(axes[:, 0], _LABELS, strict=True):
            axis.set_ylabel(label)
        handles, labels = axes[2][0].get_legend_handles_labels()
        times, words = axes[0][0].get_legend_handles_labels()
        (never,) = axes[0][0].plot([], [], "x", color="#222222")
        shown = [*times, handles[-1], never], [*words, labels[-1], "so many never had one"]
        figure.legend(*shown, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
        figure.supxlabel("\n".join(textwrap.wrap(source, 62 * len(patterns))), fontsize=7)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor=_GROUND, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def _times(axis: Any, mine: Sequence[Row], of: Callable[[Summary], Percentiles], scale: float = 1.0) -> None:
    """Median and 95th percentile; one that so many requests never had is a cross at the top."""
    for name, line, mark, words in (("p50", "-", "o", "median"), ("p95", "--", "^", "95 in 100")):
        points = [(row.rate_per_s, getattr(of(row.summary), name)) for row in mine]
        known = [(rate, scale * value) for rate, value in points if value is not None]
        never = [rate for rate, value in points if value is None]
        if never and of(mine[0].summary).num:
            at_top, colour = axis.get_xaxis_transform(), _COLOURS[mine[0].system]
            axis.plot(never, [1.0] * len(never), "x", color=colour, transform=at_top, clip_on=False, zorder=3)
        _line(axis, mine, known, linestyle=line, marker=mark, label=f"{mine[0].system}, {words}" if mine else None)


def _line(axis: Any, mine: Sequence[Row], points: Sequence[tuple[float, float]], **style: Any) -> None:
    if mine:
        rates, values = [rate for rate, _ in points], [value for _, value in points]
        axis.plot(rates, values, color=_COLOURS[mine[0].system], markersize=4.5, linewidth=1.3, **style)
