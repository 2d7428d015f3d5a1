"""The documentation fits the code and itself: links, options, and a place for every page in the site."""

import re
from pathlib import Path

import pytest

from bench.report.links import anchors, broken
from cluster.option_text import page
from cluster.options import ClusterConfig

ROOT = Path(__file__).parents[2]
# A page that a test compares with what a command writes; its links are those of docs/prefill.md.
LEFT_OUT = {"tests/unit/report/prefill.md"}
HAS_PAGES = ("docs", "kernels", "proto", "tests", "bench", "cluster", "colm", "deploy", "prefill_node", "decode_node")


def pages() -> list[Path]:
    found = [*ROOT.glob("*.md"), *(path for folder in HAS_PAGES for path in (ROOT / folder).rglob("*.md"))]
    return [path for path in found if path.relative_to(ROOT).as_posix() not in LEFT_OUT]


def test_every_link_between_files_leads_somewhere() -> None:
    listed = pages()
    assert len(listed) > 50
    assert broken(ROOT, listed) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[it](gone.md)", "page.md:3: gone.md: there is no such file"),
        ("![it](plots/gone.svg)", "page.md:3: plots/gone.svg: there is no such file"),
        ('<img src="gone.png">', "page.md:3: gone.png: there is no such file"),
        ("[it]\n\n[it]: gone.md", "page.md:5: gone.md: there is no such file"),
        ("[it](#gone)", "page.md:3: #gone: page.md has no heading of that name"),
        ("[it](other.md#part-2)", "page.md:3: other.md#part-2: other.md has no heading of that name"),
        ("[it](other.md#in-code)", "page.md:3: other.md#in-code: other.md has no heading of that name"),
        ("[it](code.py#L3)", "page.md:3: code.py#L3: code.py has no heading of that name"),
        ("[it](..)", "page.md:3: ..: it leads out"),
        ("[it](/page.md)", "page.md:3: /page.md: it leads out"),
        ("[it](folder)", "page.md:3: folder: it is a folder"),
    ],
)
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, text: str, said: str) -> None:
    (found,) = checked(tmp_path, text)
    assert found.startswith(said)


@pytest.mark.parametrize(
    "text",
    [
        "[it](other.md), [it](other.md#part-1 'x'), [it](#title), [it](code.py)",
        "[it](https://example.org/gone.md), [it](mailto:a@example.org), [it](//example.org)",
        "`[it](gone.md)`\n\n```\n[it](gone.md)\n```\n\n``a`[it](gone.md)``",
    ],
)
def test_a_link_that_leads_somewhere_passes(tmp_path: Path, text: str) -> None:
    assert checked(tmp_path, text) == []


def checked(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "folder").mkdir()
    (tmp_path / "code.py").touch()
    (tmp_path / "other.md").write_text("# Other\n## Part\n## Part\n```\n# In code\n```\n")
    one = tmp_path / "page.md"
    one.write_text(f"# Title\n\n{text}\n")
    return broken(tmp_path, [one])


def test_equal_headings_have_numbers() -> None:
    assert anchors("# A `b` c\n## It's 2.0x\n## It's 2.0x\n") == {"a-b-c", "its-20x", "its-20x-1"}


def test_every_page_of_the_docs_has_its_place_in_the_site() -> None:
    """A page without one would fail `make site`, which needs a generator; this does not."""
    way = (ROOT / "docs" / "conf.py").read_text()
    named = set(re.findall(r"[\"<]((?:docs|proto|kernels|tests)/[\w/]+)[\">]", way))
    assert (
        sorted(f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md") if f"docs/{path.stem}" not in named) == []
    )
    assert sorted(name for name in named if not (ROOT / f"{name}.md").exists()) == []


def test_the_page_of_options_is_what_their_docstrings_say() -> None:
    """Write it anew with `colm config --markdown > docs/options.md`."""
    assert (ROOT / "docs" / "options.md").read_text() == page()


def test_the_page_has_every_option_with_its_meaning() -> None:
    text = page()
    for section, field in ClusterConfig.model_fields.items():
        part = re.search(rf"^## `\[{section}\]`$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        assert part is not None
        for name, option in type(field.get_default()).model_fields.items():
            assert option.description is not None, name
            assert re.search(rf"^\| `{name}` \| .+ \| .+ \| \w.+ \|$", part[1], re.MULTILINE), name
