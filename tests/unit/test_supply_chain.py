"""What `make setup` installs is what is pinned: nothing comes in beside it, nothing is pinned that nobody needs."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
}
# What PyTorch's CUDA build brings, in the versions that it pins itself.
BROUGHT_BY_TORCH = re.compile(r"nvidia-.*|cuda-.*")


def needed() -> set[str]:
    """Packages that pyproject.toml asks for, and all that these need on this machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = project["project"]["dependencies"] + extras["dev"] + extras["bench"]
    waiting = [Requirement(word) for word in [*asked, *project["build-system"]["requires"]]]
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
    names = needed()
    assert sorted(names - PINS.keys()) == []
    assert sorted(PINS.keys() - names) == []


def test_every_package_has_its_licence_listed() -> None:
    table = (ROOT / "docs" / "licences.md").read_text()
    listed = [name for row in re.findall(r"^\| .* \| (.*) \|$", table, re.MULTILINE) for name in row.split(", ")]
    assert sorted(set(listed) - {"packages"}) == sorted(PINS)
