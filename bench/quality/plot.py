"""The rows as a figure: a column for each length, perplexity above and facts found below."""

import textwrap
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.quality.cells import DENSE, KEYS, MASS
from bench.quality.report import Row
from colm.errors import ConfigError

_COLOURS = {DENSE: "#222222", MASS: "#0072b2", KEYS: "#d55e00"}
_MARKERS = {DENSE: "D", MASS: "o", KEYS: "s"}
_LABELS = {
    (DENSE, False): "dense",
    (MASS, False): "mass, a share of the attention",
    (KEYS, False): "keys a row",
    (MASS, True): "mass, audited",
    (KEYS, True): "keys a row, audited",
}


def write_plot(path: Path, found: Sequence[Row], source: str) -> None:
    """Draw the rows as a PNG, on white: pages may be dark.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter
    except ImportError as err:
        raise ConfigError("plots need matplotlib, the extra `bench`; `make setup` installs it") from err

    columns = [(name, list(group)) for name, group in groupby(found, key=lambda row: row.length)]
    columns = [(name, group) for name, group in columns if len(group) > 1]
    figure = Figure(figsize=(2.6 * len(columns) + 1, 6.4), facecolor="white", layout="constrained")
    axes = figure.subplots(2, len(columns), squeeze=False, sharex=True, sharey="row")
    for column, (name, group) in enumerate(columns):
        above, below = axes[0][column], axes[1][column]
        for row in group:
            _point(above, below, row)
        above.set_title(f"{name} tokens" if "," not in name else name.replace(",", " tokens,"), fontsize=11)
        for axis in (above, below):
            axis.grid(color="#dddddd", linewidth=0.6)
            axis.set_axisbelow(True)
        above.axhline(0.0, color="#222222", linewidth=0.8)
        below.set_xscale("log")
        below.margins(x=0.12)
        below.xaxis.set_major_locator(FixedLocator([0.05, 0.1, 0.2, 0.5, 1.0]))
        below.xaxis.set_minor_formatter(NullFormatter())
        below.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}"))
        below.set_ylim(-0.05, 1.05)
    axes[0][0].set_ylabel("perplexity of the last 1,000 tokens:\nchange from dense, % (± 1 std. error)")
    axes[1][0].set_ylabel("share of planted facts found\n(95% interval)")
    wrapped = textwrap.fill(source, 45 * len(columns))
    figure.supxlabel(
        f"share of the prompt's causal key pairs that attention lists (log scale)\n\n{wrapped}", fontsize=8
    )
    handles = dict(pair for axis in axes[0] for pair in zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    order = [label for label in _LABELS.values() if label in handles]
    figure.legend([handles[label] for label in order], order, loc="outside upper center", ncols=len(order), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _point(above: Any, below: Any, row: Row) -> None:
    kind = row.budget.kind
    style = {
        "fmt": _MARKERS[kind],
        "color": _COLOURS[kind],
        "markerfacecolor": "white" if row.is_audited else _COLOURS[kind],
        "markersize": 6,
        "elinewidth": 1,
        "capsize": 2,
        "label": _LABELS[kind, row.is_audited],
    }
    value, error = (1.0, 0.0) if row.over_dense is None else row.over_dense
    above.errorbar(row.density, 100.0 * (value - 1.0), yerr=100.0 * error, **style)
    if kind != DENSE:
        at, offset = (row.density, 100.0 * (value - 1.0)), (3, 6) if kind == KEYS else (3, -11)
        above.annotate(f"{row.budget.size:g}", at, xytext=offset, textcoords="offset points", fontsize=7)
    share, low, high = row.share_found
    below.errorbar(row.density, share, yerr=[[share - low], [high - share]], **style)
