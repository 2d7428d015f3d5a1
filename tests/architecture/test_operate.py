"""docs/operate.md explains messages that the code still gives."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
SOURCE = "\n".join(
    path.read_text(encoding="utf-8")
    for folder in ("cluster", "colm", "decode_node", "prefill_node")
    for path in sorted((ROOT / folder).rglob("*.py"))
)


def plain(text: str) -> str:
    """Source without line breaks inside messages, and with one mark for every value in them."""
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_every_message_of_the_tables_is_in_the_source() -> None:
    source = plain(SOURCE)
    rows = re.findall(r"^\| (.*?) \|", PAGE[PAGE.index("## When something fails") :], re.MULTILINE)
    said = [word.strip() for row in rows for word in re.findall(r"`((?:[^`]|`colm \w+`)+?)`(?= \.\.\.|,| or|$)", row)]
    assert len(said) >= 45
    assert [word for word in said if word not in source] == []
