"""`make test` in several processes: what it says, and that a failure in either is its own."""

import pytest

from tests.side_by_side import main

PASSES, FAILS = ("--version",), ("--no-such-option",)


@pytest.mark.parametrize("parts", [{"one": PASSES, "other": FAILS}, {"one": FAILS, "other": PASSES}], ids=str)
def test_a_failure_of_either_part_is_a_failure(
    parts: dict[str, tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(parts) == 1
    lines = capsys.readouterr().out.splitlines()
    assert {line.partition(" after ")[0] for line in lines if " after " in line} == {
        f"{name}: ended with {0 if arguments is PASSES else 4}" for name, arguments in parts.items()
    }
    assert all(line.startswith(("one: ", "other: ")) for line in lines)


def test_all_pass_where_every_part_passes() -> None:
    assert main({"one": PASSES, "other": PASSES}) == 0
