"""What `make setup` installs is what is pinned: nothing comes in beside it, nothing is pinned that nobody needs."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def pins(file: str) -> dict[str, list[str]]:
    """The packages of a list, with the lines that follow each."""
    blocks = re.split(r"^(?=\w)", (ROOT / file).read_text(), flags=re.MULTILINE)
    return {canonicalize_name(block.partition("==")[0]): block.splitlines()[1:] for block in blocks if "==" in block}


SERVING, DEVELOPMENT = pins("requirements.txt"), pins("requirements-dev.txt")
PINS = SERVING | DEVELOPMENT
# What PyTorch's CUDA build brings, in the versions that it pins itself.
BROUGHT_BY_TORCH = re.compile(r"nvidia-.*|cuda-.*")


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
OF_SERVING = PROJECT["project"]["dependencies"] + PROJECT["build-system"]["requires"]


def needed(asked: list[str]) -> set[str]:
    """Packages that are asked for, and all that these need on this machine."""
    waiting = [Requirement(word) for word in asked]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen or BROUGHT_BY_TORCH.fullmatch(name):
                continue
            seen.add((name, extra))
            try:
                words = requires(name) or []
            except PackageNotFoundError:
                continue
            further = [Requirement(word) for word in words]
            waiting += [one for one in further if one.marker is None or one.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


def test_every_package_is_pinned_and_every_pin_is_needed() -> None:
    """Bug: hf-xet came in as it was that day, and others were pinned for nobody."""
    names = needed(OF_SERVING + EXTRAS["dev"] + EXTRAS["bench"])
    assert sorted(names - PINS.keys()) == []
    assert sorted(PINS.keys() - names) == []


def test_serving_needs_no_package_of_development() -> None:
    assert sorted(SERVING) == sorted(needed(OF_SERVING))
    assert not SERVING.keys() & DEVELOPMENT.keys()


@pytest.mark.parametrize("file", sorted(path.name for path in ROOT.glob("requirements*.txt")))
def test_every_pin_has_the_hashes_of_its_files(file: str) -> None:
    """Bug: whoever could change a file on its way could change what was installed."""
    hashed = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")
    assert pins(file)
    assert [name for name, lines in pins(file).items() if not lines or not all(map(hashed.fullmatch, lines))] == []


def test_every_extra_that_is_installed_by_hand_is_pinned() -> None:
    assert all("==" in word for word in EXTRAS["gpu"])


def test_every_package_has_its_licence_listed() -> None:
    table = (ROOT / "docs" / "licences.md").read_text()
    listed = [name for row in re.findall(r"^\| .* \| (.*) \|$", table, re.MULTILINE) for name in row.split(", ")]
    assert sorted(set(listed) - {"packages"}) == sorted(PINS)
