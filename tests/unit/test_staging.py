"""A directory is replaced whole or left as it was, whatever fails."""

import errno
import shutil
from pathlib import Path

import pytest

from colm.staging import staged


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A directory that exists already."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    return tmp_path / "model"


def replace(target: Path) -> None:
    with staged(target) as whole:
        (whole / "weights").write_text("new")


def assert_only(target: Path, contents: str) -> None:
    assert (target / "weights").read_text() == contents
    assert list(target.parent.iterdir()) == [target]


def fail_renames(monkeypatch: pytest.MonkeyPatch, *failing: str) -> None:
    """Make renames of directories of these names fail, as on a broken disk."""
    rename = Path.rename

    def maybe(self: Path, to: Path) -> Path:
        if self.name in failing:
            raise OSError(errno.EIO, "Input/output error", str(self), None, str(to))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", maybe)


def test_the_new_directory_replaces_the_old_one(target: Path) -> None:
    replace(target)
    assert_only(target, "new")


def test_a_link_is_replaced_and_what_it_points_to_is_left_alone(target: Path, tmp_path: Path) -> None:
    link = tmp_path / "links" / "model"
    link.parent.mkdir()
    link.symlink_to(target)
    replace(link)
    assert_only(link, "new")
    assert not link.is_symlink()
    assert (target / "weights").read_text() == "old"


def test_the_old_directory_comes_back_when_the_new_one_cannot_take_its_place(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the old directory had been moved into the staging directory and was deleted with it."""
    fail_renames(monkeypatch, "new")
    with pytest.raises(OSError, match="Input/output error"):
        replace(target)
    assert_only(target, "old")


def test_the_old_directory_comes_back_when_the_new_one_is_gone(target: Path) -> None:
    """Bug: as above, with a rename that fails by itself."""
    with pytest.raises(FileNotFoundError), staged(target) as whole:
        shutil.rmtree(whole)
    assert_only(target, "old")


def test_a_directory_that_cannot_be_moved_away_stays(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_renames(monkeypatch, target.name)
    with pytest.raises(OSError, match="Input/output error"):
        replace(target)
    assert_only(target, "old")


def test_an_old_directory_that_cannot_come_back_is_kept_where_the_error_says(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_renames(monkeypatch, "new", "old")
    with pytest.raises(OSError, match="Input/output error") as failure:
        replace(target)
    assert (Path(failure.value.filename) / "weights").read_text() == "old"
    assert failure.value.filename2 == str(target)


def test_the_old_directory_is_untouched_when_the_block_fails(target: Path) -> None:
    with pytest.raises(RuntimeError), staged(target):
        raise RuntimeError
    assert_only(target, "old")
