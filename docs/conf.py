"""The documentation as a site: Sphinx reads the Markdown files where they lie (`make site`)."""

import shutil
from pathlib import Path
from typing import Final

from sphinx.application import Sphinx

# A reader's way. It is put behind a page's text as that is read, so the files themselves have no marks of the site.
_WAY: Final = {
    "README": {
        "Use": ["Quick start <self>", "docs/openai", "proto/README"],
        "Run a cluster": [
            "Deploy on Kubernetes <docs/deploy>",
            "Configure: all options <docs/options>",
            "Observe: metrics, traces <docs/metrics>",
            "Secure: who is trusted <docs/security>",
            "Change, watch, troubleshoot <docs/operate>",
            "Size: model by model <docs/sizing>",
        ],
        "Design": [
            "docs/architecture",
            "docs/adr/README",
            "kernels/README",
            "Tests by risk <tests/COVERAGE>",
            "docs/log",
        ],
        "Benchmarks": [
            "Prefill and the paper <docs/prefill>",
            "docs/serving",
            "Quality <docs/quality>",
            "docs/machines",
            "docs/simulate",
        ],
        "More": ["docs/licences"],
    },
    "docs/adr/README": {"": ["[0-9]*"]},
}

project = "colm-serve"
root_doc = "README"
include_patterns = ["README.md", "docs/**.md", "proto/README.md", "kernels/README.md", "tests/COVERAGE.md"]
extensions = ["myst_parser"]
myst_heading_anchors = 4
suppress_warnings = ["misc.highlighting_failure", "myst.header"]  # what harms no reader
html_theme = "furo"
html_title = project
html_show_sphinx = False


def _append_way(_app: Sphinx, page: str, text: list[str]) -> None:
    for caption, entries in _WAY.get(page, {}).items():
        options = [":maxdepth: 1", ":glob:"] + ([f":caption: {caption}", ":hidden:"] if caption else [])
        text[0] += "\n".join(["", "```{toctree}", *options, "", *entries, "```", ""])


def _name_first_page(app: Sphinx, error: Exception | None) -> None:
    if error is None:
        shutil.copyfile(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> None:
    """Sphinx calls it."""
    app.connect("source-read", _append_way)
    app.connect("build-finished", _name_first_page)
