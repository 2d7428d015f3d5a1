"""Tables in Markdown, and the part of a page that a benchmark writes."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from colm.errors import ConfigError


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def replace_between(page: Path, begin: str, end: str, lines: Sequence[str]) -> None:
    """Put lines between a page's two markers, in place of what is there.

    Raises:
        ConfigError: the page cannot be read or has not the two markers.
    """
    before, after = around(page, begin, end)
    page.write_text(before + "\n".join([begin, *lines, end]) + after, encoding="utf-8")


def around(page: Path, begin: str, end: str) -> tuple[str, str]:
    """What stands before and after a page's two markers.

    Raises:
        ConfigError: the page cannot be read or has not the two markers.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as err:
        raise ConfigError(f"{page} cannot be read: {err.strerror}") from err
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ConfigError(f"{page} has no place for the table, which is between {begin} and {end}")
    return before, after
