"""A short share of `make fuzz`: no damaged file or message ends in anything but a typed error, or well."""

from tests.fuzz.child import KINDS
from tests.fuzz.runner import run

NUM_CASES = 400
MAX_S = 60.0
"""On a machine that is busy; alone it is a few seconds."""


def test_damaged_files_and_messages_end_well_or_in_a_typed_error() -> None:
    """Bug: 92 of 314 crafted model files ended in an untyped exception, and 13 hung."""
    counts = run(list(KINDS), seed=1, first=0, num_cases=NUM_CASES, seconds=MAX_S)
    assert counts.other == {}
    assert counts.typed.total() > counts.ok.total() > 0
