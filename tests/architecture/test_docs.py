"""The documentation fits the code and itself: links, options, and a place for every page in the site."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from bench.report.links import anchors, broken
from cluster.cli import app
from cluster.option_text import page
from cluster.options import ClusterConfig

ROOT = Path(__file__).parents[2]
# A page that a test compares with what a command writes; its links are those of docs/prefill.md.
LEFT_OUT = {"tests/unit/report/prefill.md"}
HAS_PAGES = ("docs", "kernels", "proto", "tests", "bench", "cluster", "colm", "deploy", "prefill_node", "decode_node")

COMMANDS = typer.main.get_command(app)


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


def spoken(text: str) -> Iterator[str]:
    """What a page has as code: lines of its blocks, and words between backticks."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from block.splitlines()
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (" ".join(word.split()) for word in re.findall(r"`([^`]+)`", rest))


def wrong_words(line: str) -> list[str]:
    """Of a `colm` command in it: commands that do not exist, and flags that the command does not take."""
    wrong = []
    for said in re.findall(r"(?<![\w/.-])colm ([a-z][^#|;]*)", line):
        words = [word.strip("\"',)") for word in said.split()]
        command: Any = COMMANDS
        while words and hasattr(command, "commands"):
            word = words.pop(0)
            if word not in command.commands:
                wrong += [word] if re.fullmatch(r"[a-z][a-z-]*", word) else []
                break
            command = command.commands[word]
        known = {"--help", *(flag for each in command.params for flag in (*each.opts, *each.secondary_opts))}
        wrong += [word for word in words if word.startswith("--") and word.split("=")[0] not in known]
    return wrong


def test_every_command_of_the_pages_exists_with_its_flags() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {line}: {words}"
        for path in pages()
        for line in spoken(path.read_text())
        if (words := wrong_words(line))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("colm up --model DIR --decode 2   # --gone", []),
        ("HEAD=x; kubectl exec $HEAD -c ray-head -- colm token create NAME --secrets DIR", []),
        ("colm upp", ["upp"]),
        ("colm token create NAME --secret DIR", ["--secret"]),
    ],
)
def test_a_command_that_does_not_exist_is_named(line: str, wrong: list[str]) -> None:
    assert wrong_words(line) == wrong


def test_every_module_and_target_that_a_page_has_one_run_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    missing = []
    for path in pages():
        for line in spoken(path.read_text()):
            for module in re.findall(r"python -m ((?:bench|tests|prefill_node|decode_node)[\w.]*)", line):
                place = ROOT / module.replace(".", "/")
                if not (place.with_suffix(".py").exists() or (place / "__main__.py").exists()):
                    missing.append(f"{path.name}: python -m {module}")
            if (target := re.match(r"make ([a-z-]+)$", line)) and target[1] not in targets:
                missing.append(f"{path.name}: {line}")
    assert missing == []


def test_every_decision_that_is_named_exists() -> None:
    there = {int(path.name[:4]) for path in (ROOT / "docs" / "adr").glob("0*.md")}
    folders = ("bench", "cluster", "colm", "decode_node", "prefill_node", "kernels", "proto", "tests")
    files = [*pages(), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    gone = {
        f"{path.relative_to(ROOT)}: ADR {number}"
        for path in files
        for said in re.findall(r"\bADRs? (\d+(?:(?:, | and )\d+)*)", path.read_text(encoding="utf-8"))
        for number in re.findall(r"\d+", said)
        if int(number) not in there
    }
    assert sorted(gone) == []


VALUE = r"(?: = [^`]*)?"
NAMED_OPTION = re.compile(
    rf"`(?P<a>\w+)\.(?P<b>\w+){VALUE}`|`(?P<d>\w+){VALUE}` in `\[(?P<c>\w+)\]`|`\[(?P<e>\w+)\] (?P<f>\w+){VALUE}`"
)


def test_every_option_and_metric_that_a_page_names_exists() -> None:
    options = {name: type(field.get_default()).model_fields for name, field in ClusterConfig.model_fields.items()}
    metrics = set(re.findall(r"^\| `(colm_\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
    gone, num_options = [], 0
    for path in pages():
        if path.parent.name == "adr":  # what was decided may be called otherwise by now
            continue
        text = path.read_text()
        for found in NAMED_OPTION.finditer(text):
            section = found["a"] or found["c"] or found["e"]
            option = found["b"] or found["d"] or found["f"]
            num_options += section in options
            if section in options and option not in options[section] and option != "py":
                gone.append(f"{path.name}: {section}.{option}")
        names = set(re.findall(r"`(colm_\w+_(?:total|seconds|bytes|jobs|requests|pages))`", text))
        gone += [f"{path.name}: {name}" for name in sorted(names - metrics)]
    assert num_options > 60
    assert gone == []
