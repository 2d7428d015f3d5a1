"""The check that every link from one file of the repository to another leads somewhere.

A code host and the site (`make site`) read the same Markdown. So a link is relative and leads to a file: the site has
no folders, and cannot know where a code host is. What stands behind `#` is a heading's name as GitHub writes it.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench.report.figures import sections, slug

_CODE: Final = re.compile(r"^```.*?^```|``.+?``|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_LINK: Final = re.compile(
    r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^\[[^\]]+\]:\s+(\S+)|(?:href|src)=\"([^\"]+)\"", re.MULTILINE
)
_ELSEWHERE: Final = re.compile(r"[a-z][a-z+.-]*:|//", re.IGNORECASE)


def broken(root: Path, pages: list[Path]) -> list[str]:
    """Links that lead nowhere, each as `page:line: target: why`.

    Args:
        root: of the repository; a link out of it leads nowhere.
        pages: the Markdown files that are read.
    """
    found = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for line, target in _links(text):
            why = _why_broken(root, page, target)
            if why is not None:
                found.append(f"{page.relative_to(root).as_posix()}:{line}: {target}: {why}")
    return found


def anchors(text: str) -> set[str]:
    """Names by which a page's headings are linked; of equal headings the later ones are numbered."""
    slugs = [slug(each.heading) for each in sections("", text) if each.heading]
    seen: Counter[str] = Counter()
    names = set()
    for name in slugs:
        names.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def _links(text: str) -> Iterator[tuple[int, str]]:
    """Relative links and their lines; code is no link."""
    text = _CODE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), text)
    for match in _LINK.finditer(text):
        target = match[1] or match[2] or match[3]
        if not _ELSEWHERE.match(target):
            yield text.count("\n", 0, match.start()) + 1, target


def _why_broken(root: Path, page: Path, target: str) -> str | None:
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.is_relative_to(root.resolve()) or path.startswith("/"):
        return "it leads out of the repository; link a file of it, relative to the page"
    if not file.exists():
        return "there is no such file"
    if file.is_dir():
        return "it is a folder, which the site does not have; link a file in it"
    if anchor and (file.suffix != ".md" or anchor not in anchors(file.read_text(encoding="utf-8"))):
        return f"{file.name} has no heading of that name"
    return None
