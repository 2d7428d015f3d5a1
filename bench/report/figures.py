"""How a figure names its record, and the check that all of them do.

A *figure* is a number with a unit of speed (tokens/s, GB/s, GFLOP/s, TFLOP/s), a ratio such as 3.1x, a time with a
decimal such as 11.9 s, or a picture. It stands in a section, from one heading to the next. A section, or the
introduction of its page for all of its sections, *names its record* by one of

- the path of a file under `bench/results/`, in a link or as code, which must exist and hold JSON; of what is modelled,
  that of its machine's file under `bench/roofline/machines/`;
- a link to an entry of `docs/log.md`, which must exist;
- in `docs/log.md` itself: the command that repeats the measurement, the words "not kept" where there is none, or the
  commit.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.harness import records

PAGES: Final = ("README.md", "kernels/README.md", "docs/*.md")
LOG: Final = "docs/log.md"

_FIGURE: Final = re.compile(
    r"\d\s?(?:tokens/s|[MGT]B/s|[GT]FLOP/s)"
    r"|(?<![\w.])\d+(?:\.\d+)?x(?!\w)"
    r"|(?<![\w.])\d+\.\d+ (?:s|ms|us|µs)(?!\w)"
    r"|!\[[^]]*\]\([^)]*plots/[^)]+\)"
)
_RECORD: Final = re.compile(r"bench/results/[\w./-]+\.jsonl?|bench/roofline/machines/[\w-]+\.toml")
_ENTRY: Final = re.compile(r"\((?:docs/)?log\.md#([\w-]+)\)")
_LOGGED: Final = re.compile(r"`(?:python -m|make|colm) |not kept|[Cc]ommits? [0-9a-f]{7}\b|logged in [0-9a-f]{7}\b")
_HEADING: Final = re.compile(r"(#+) (.+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """From one heading to the next."""

    page: str
    line: int
    heading: str
    text: str
    is_introduction: bool


def sections(page: str, text: str) -> Iterator[Section]:
    """A page's sections; what looks like a heading inside a code block is none."""
    start, heading, level, is_code = 1, "", 0, False
    kept: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        is_code ^= line.startswith("```")
        if not is_code and (found := _HEADING.fullmatch(line)):
            yield Section(page=page, line=start, heading=heading, text="\n".join(kept), is_introduction=level < 2)
            start, heading, level, kept = number, found[2], len(found[1]), []
        else:
            kept.append(line)
    yield Section(page=page, line=start, heading=heading, text="\n".join(kept), is_introduction=level < 2)


def slug(heading: str) -> str:
    """The name by which GitHub links a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def problems(root: Path, pages: Sequence[str] = PAGES) -> list[str]:
    """Figures without a record, and records that are not there; each as `page:line: what`. Links: `links.py`."""
    paths = [path for pattern in pages for path in sorted(root.glob(pattern))]
    entries = {slug(each.heading) for each in sections(LOG, _text(root / LOG))}
    found = []
    for path in paths:
        page = path.relative_to(root).as_posix()
        listed = list(sections(page, _text(path)))
        of_page = any(_names_a_record(each, entries) for each in listed if each.is_introduction)
        for each in listed:
            where = f"{page}:{each.line}"
            found += [f"{where}: {what}" for what in _missing(each, root)]
            figure = _FIGURE.search(each.text)
            if figure and not of_page and not _names_a_record(each, entries):
                found.append(f"{where}: {figure[0]!r} under {each.heading!r} names no record")
    return found


def _missing(section: Section, root: Path) -> Iterator[str]:
    for record in _RECORD.findall(section.text):
        if (what := _unreadable(root / record)) is not None:
            yield f"{record} {what}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _names_a_record(section: Section, entries: set[str]) -> bool:
    if section.page == LOG and _LOGGED.search(section.text):
        return True
    return bool(_RECORD.search(section.text)) or any(entry in entries for entry in _ENTRY.findall(section.text))


def _unreadable(path: Path) -> str | None:
    if not path.is_file():
        return "does not exist"
    try:
        if path.suffix == ".toml":
            tomllib.loads(path.read_text(encoding="utf-8"))
            return None
        if path.suffix == ".jsonl":
            return None if records.read(path) else "holds no record"
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        return f"is no record: {err}"
    return None
