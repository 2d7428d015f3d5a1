"""`colm config` prints a file that `colm up --config` reads, and that says what the defaults are."""

import re
import tomllib
from pathlib import Path

from cluster.option_text import default_toml, page
from cluster.options import ClusterConfig, load_config


def test_the_printed_file_is_read_and_changes_nothing(tmp_path: Path) -> None:
    """Bug: of a description of two lines the second was no comment."""
    file = tmp_path / "colm.toml"
    file.write_text(default_toml())
    assert load_config(file, {}) == ClusterConfig()


def test_what_is_commented_out_is_the_default(tmp_path: Path) -> None:
    file = tmp_path / "colm.toml"
    file.write_text(re.sub(r"^# (?=\w+ = (?!\.\.\.))", "", default_toml(), flags=re.MULTILINE))
    assert load_config(file, {}) == ClusterConfig()
    written = tomllib.loads(file.read_text())
    assert sum(map(len, written.values())) > 40


def test_the_page_says_both_ends_of_a_range() -> None:
    """Bug: a share that is above 0 and at most 1 was "None to 1"."""
    assert "| `target_use` | `0.8` | number above 0, up to 1 |" in page()
    assert "None" not in page()
