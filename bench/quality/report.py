"""The outcomes as rows, and the rows as tables: in the terminal, as JSON, in docs/quality.md."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.harness.markdown import replace_between
from bench.harness.units import length
from bench.quality.cells import DENSE, KEYS, MASS, Budget, Cell
from bench.quality.experiment import Outcome
from bench.quality.metrics import Ratio, clopper_pearson, perplexity, perplexity_ratio

BEGIN, END = "<!-- bench.quality: table -->", "<!-- bench.quality: end -->"
COLUMNS = ("text", "attention", "audit", "keys listed", "perplexity", "over dense", "facts found", "95% interval")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One kind of attention at one length, over all texts of which it and the baseline have run."""

    num_tokens: int
    is_stretched: bool
    budget: Budget
    is_audited: bool
    num_texts: int
    density: float
    perplexity: float
    over_dense: Ratio | None
    """None of the baseline itself."""
    num_found: int
    num_asked: int

    @property
    def length(self) -> str:
        """E.g. `32K, YaRN`."""
        return length(self.num_tokens) + ", YaRN" * self.is_stretched

    @property
    def share_found(self) -> tuple[float, float, float]:
        """Share of the facts that were found, and its interval at 95%."""
        return self.num_found / self.num_asked, *clopper_pearson(self.num_found, self.num_asked)

    def words(self) -> tuple[str, ...]:
        """As in `COLUMNS`."""
        over = "1" if self.over_dense is None else f"{self.over_dense.value:.4f} ± {self.over_dense.error:.4f}"
        _, low, high = self.share_found
        audit = "" if self.budget.kind == DENSE else "yes" if self.is_audited else "no"
        found = f"{self.num_found} of {self.num_asked}"
        figures = (f"{self.density:.3f}", f"{self.perplexity:.3f}", over, found, f"{low:.2f} to {high:.2f}")
        return (self.length, str(self.budget), audit, *figures)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        _, low, high = self.share_found
        return {
            "num_tokens": self.num_tokens,
            "stretched": self.is_stretched,
            "attention": str(self.budget),
            "audited": self.is_audited,
            "num_texts": self.num_texts,
            "density": self.density,
            "perplexity": self.perplexity,
            "over_dense_x": None if self.over_dense is None else self.over_dense.value,
            "over_dense_standard_error": None if self.over_dense is None else self.over_dense.error,
            "num_facts_found": self.num_found,
            "num_facts_asked": self.num_asked,
            "facts_found_low": low,
            "facts_found_high": high,
        }


def rows(outcomes: Mapping[Cell, Outcome]) -> list[Row]:
    """Outcomes of all texts together, by length; within one dense, then shares, then keys, then what is audited."""
    groups: dict[tuple[bool, int, Budget, bool], list[Cell]] = {}
    for cell in outcomes:
        if cell.baseline in outcomes:
            key = (cell.is_stretched, cell.num_tokens, cell.budget, cell.is_audited)
            groups.setdefault(key, []).append(cell)
    kinds = (DENSE, MASS, KEYS)

    def place(key: tuple[bool, int, Budget, bool]) -> tuple[bool, int, bool, int, float]:
        is_stretched, num_tokens, budget, is_audited = key
        return is_stretched, num_tokens, is_audited, kinds.index(budget.kind), budget.size

    return [_row(groups[key], outcomes) for key in sorted(groups, key=place)]


def _row(group: Sequence[Cell], outcomes: Mapping[Cell, Outcome]) -> Row:
    first, mine = group[0], [outcomes[cell] for cell in group]
    blocks = [each for outcome in mine for each in outcome.nll_blocks]
    baseline = [each for cell in group for each in outcomes[cell.baseline].nll_blocks]
    return Row(
        num_tokens=first.num_tokens,
        is_stretched=first.is_stretched,
        budget=first.budget,
        is_audited=first.is_audited,
        num_texts=len(group),
        density=sum(outcome.density for outcome in mine) / len(mine),
        perplexity=perplexity(blocks),
        over_dense=None if first == first.baseline else perplexity_ratio(blocks, baseline),
        num_found=sum(sum(outcome.found) for outcome in mine),
        num_asked=sum(len(outcome.found) for outcome in mine),
    )


def print_table(out: Console, found: Iterable[Row]) -> None:
    """The rows, for people."""
    table = Table(*COLUMNS, box=SIMPLE_HEAD)
    for row in found:
        table.add_row(*row.words())
    out.print(table)


def write_table(page: Path, found: Sequence[Row], source: str) -> None:
    """Put the rows between a page's two markers, in place of what is there.

    Raises:
        ConfigError: the page cannot be read or has not the two markers.
    """
    words = [COLUMNS, ("---",) * len(COLUMNS), *(row.words() for row in found)]
    replace_between(page, BEGIN, END, [*(f"| {' | '.join(each)} |" for each in words), "", source])


def source_of(setting: Mapping[str, Any], environments: Sequence[Mapping[str, Any]], chains: str = "chain 1") -> str:
    """Where the figures come from, in a sentence or two."""
    commits = sorted({each["commit"][:7] for each in environments})
    cpus = sorted({str(each["cpu"]) for each in environments})
    threads = sorted({str(each["threads"]) for each in environments})
    pythons = sorted({each["versions"]["python"] for each in environments})
    text = f"Python {', '.join(pythons)}'s text, SHA-256 {setting['text_sha256'][:12]}"
    machine = f"{', '.join(cpus)}, threads: {', '.join(threads)}; commits {', '.join(commits)}"
    return f"{setting['model']}, {chains}, {setting['dtype']}; {text}; {machine}."
