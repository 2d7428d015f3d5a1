"""`make audit`: the pinned packages, looked up in the public list of known weaknesses by pip-audit.

pip-audit counts a package that it was told nothing about as one without weaknesses. Here that is not an answer.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

CLEAN, WEAK, NOT_AUDITED = 0, 1, 2
"""Exit statuses: all is well; a package has a known weakness; nobody knows, since the list cannot be had."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What is known of the packages of one list."""

    num_packages: int
    weak: tuple[str, ...]
    """Name, version and weakness, one line each."""
    unknown: tuple[str, ...]
    """Packages that could not be looked up."""


def main(words: list[str] | None = None) -> int:
    """Look up each list, say what was found, and return the worst of the exit statuses, weaknesses before ignorance."""
    parser = argparse.ArgumentParser(prog="python -m tests.audit", description=__doc__)
    parser.add_argument("lists", nargs="+", help="requirements files with hashes")
    parser.add_argument("--pip-audit", default="pip-audit", help="the command")
    parser.add_argument("--service", default="pypi", help="pypi, osv or esms: whose list (default pypi)")
    parser.add_argument("--osv-url", help="where osv's list is, if not at its usual place")
    options = parser.parse_args(words)
    more = ["--vulnerability-service", options.service, *(["--osv-url", options.osv_url] if options.osv_url else [])]
    statuses = {_report(file, _audit([options.pip_audit, *more], file)) for file in options.lists}
    return next(status for status in (WEAK, NOT_AUDITED, CLEAN) if status in statuses)


def _audit(command: list[str], file: str) -> Audit | str:
    """What pip-audit says of a list, or why it says nothing."""
    fixed = ["--disable-pip", "--require-hashes", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run([*command, *fixed, "--requirement", file], capture_output=True, text=True)
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return (done.stderr or done.stdout).strip()[-600:] or f"{command[0]} ended with {done.returncode}"
    return Audit(
        num_packages=len(packages),
        weak=tuple(
            f"{package['name']} {package['version']}: {weakness['id']}, repaired in "
            f"{', '.join(weakness.get('fix_versions', [])) or 'no version yet'}"
            for package in packages
            for weakness in package.get("vulns", ())
        ),
        unknown=tuple(package["name"] for package in packages if "skip_reason" in package),
    )


def _report(file: str, audit: Audit | str) -> int:
    if isinstance(audit, str):
        _say(f"{file}: NOT AUDITED: {audit}")
        return NOT_AUDITED
    for line in audit.weak:
        _say(f"{file}: {line}")
    if audit.unknown:
        _say(
            f"{file}: NOT AUDITED IN FULL: the list of known weaknesses cannot be had here for {len(audit.unknown)} of "
            f"{audit.num_packages} packages, {audit.unknown[0]} first; run it where pypi.org or --osv-url is reached"
        )
    if not audit.unknown or audit.weak:
        _say(f"{file}: {len(audit.weak)} known weaknesses in {audit.num_packages} packages")
    return WEAK if audit.weak else NOT_AUDITED if audit.unknown else CLEAN


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
