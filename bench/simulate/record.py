"""What a plan came to: the record, and what docs/simulate.md shows of it."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import PositiveFloat, PositiveInt

from bench.harness import markdown
from bench.harness.units import digits, duration
from bench.serving.plot import check_plots
from bench.serving.trace import Strict

ROOT: Final = Path(__file__).parents[2]
RECORD: Final = ROOT / "bench/results/simulate.json"
PAGE: Final = ROOT / "docs/simulate.md"
PLOT: Final = ROOT / "docs/plots/simulate.svg"
BEGIN: Final = "<!-- written by python -m bench.simulate plan --write-docs -->"
END: Final = "<!-- end -->"

COLUMNS: Final = (
    "objective",
    "network",
    "prefill",
    "decode",
    "first token, p50 / p95",
    "a token, p50 / p95",
    "busy: prefill, decode",
    "answers a step",
)
_COLOURS: Final = ("#1f5fa8", "#b3531d", "#3d7f4a", "#7a4f9a")
_GROUND: Final = "#fbfbf9"


class PlanRow(Strict):
    """One objective behind one network."""

    objective: str
    network_gbit: PositiveFloat
    num_prefill: PositiveInt | None
    """None where no number of replicas does."""
    num_decode: PositiveInt | None
    figures: dict[str, Any] | None

    def words(self) -> list[str]:
        """A line of the table."""
        network = f"{self.network_gbit:g} Gb/s"
        if self.figures is None:
            return [self.objective, network, *["none does"] * 2, *[""] * 4]
        ttft, tpot = self.figures["ttft_s"], self.figures["tpot_s"]
        return [
            self.objective,
            network,
            str(self.num_prefill),
            str(self.num_decode),
            f"{duration(ttft['p50'])} / {duration(ttft['p95'])}",
            f"{duration(tpot['p50'])} / {duration(tpot['p95'])}",
            f"{self.figures['prefill_busy']:.0%}, {self.figures['decode_busy']:.0%}",
            digits(self.figures["decode_batch"]),
        ]


class PlanRecord(Strict):
    """A whole plan."""

    modelled: bool = True
    command: str
    commit: str
    dirty: bool
    question: str
    """In words."""
    rows: list[PlanRow]


def load(path: Path = RECORD) -> PlanRecord:
    """The record that is kept."""
    return PlanRecord.model_validate_json(path.read_text(encoding="utf-8"))


def store(record: PlanRecord, path: Path = RECORD) -> None:
    """Keep a record in place of the one before."""
    path.write_text(json.dumps(record.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")


def lines(record: PlanRecord) -> list[str]:
    """What stands between the page's markers."""
    changed = ", with changes" if record.dirty else ""
    return [
        record.question,
        "",
        *markdown.table(COLUMNS, [row.words() for row in record.rows]).splitlines(),
        "",
        f"![Replicas of each pool by network and objective](plots/{PLOT.name})",
        "",
        f"Modelled. [Record](../{RECORD.relative_to(ROOT)}), commit {record.commit[:7]}{changed}:",
        "",
        "```",
        *textwrap.wrap(record.command, 118, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False),
        "```",
    ]


def write_docs(record: PlanRecord) -> None:
    """Put table and plot into docs/simulate.md.

    Raises:
        ConfigError: matplotlib is not installed, or the page has no place for them.
    """
    check_plots()
    markdown.replace_between(PAGE, BEGIN, END, lines(record))
    write_plot(record, PLOT)


def write_plot(record: PlanRecord, path: Path) -> None:
    """Draw a bar for each row: prefill replicas, and decode replicas on top of them."""
    check_plots()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    objectives = list(dict.fromkeys(row.objective for row in record.rows))
    with mpl.rc_context({"svg.hashsalt": "colm", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(2.9 * len(objectives) + 0.8, 3.8), facecolor=_GROUND, layout="constrained")
        for axis, objective in zip(
            figure.subplots(1, len(objectives), squeeze=False, sharey=True)[0], objectives, strict=True
        ):
            _bars(axis, [row for row in record.rows if row.objective == objective])
            axis.set_title("\n".join(textwrap.wrap(objective, 34)), fontsize=8.5)
        first = figure.axes[0]
        first.set_ylabel("replicas")
        figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
        figure.supxlabel("\n".join(textwrap.wrap(f"Modelled. {record.question}", 44 * len(objectives))), fontsize=7)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor=_GROUND, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def _bars(axis: Any, rows: Sequence[PlanRow]) -> None:
    names = [f"{row.network_gbit:g} Gb/s" for row in rows]
    prefill, decode = ([getattr(row, name) or 0 for row in rows] for name in ("num_prefill", "num_decode"))
    for label, numbers, below, colour in (
        ("prefill", prefill, [0] * len(rows), _COLOURS[0]),
        ("decode", decode, prefill, _COLOURS[1]),
    ):
        bars = axis.bar(names, numbers, bottom=below, color=colour, width=0.6, label=label)
        axis.bar_label(bars, [str(number) if number else "" for number in numbers], label_type="center", color="white")
    axis.grid(visible=True, axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_facecolor(_GROUND)
