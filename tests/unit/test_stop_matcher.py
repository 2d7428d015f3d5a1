"""Stop strings end an answer at the same place however its text is cut into tokens."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from decode_node.stop_matcher import StopMatcher

LETTERS = "ab"


def text_before_the_first_stop(text: str, stops: list[str]) -> str | None:
    """The reference, letter by letter: the first stop string to be complete ends the text where it began. If several
    are complete at once, the longest counts.
    """
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return None


def cut(text: str, lengths: list[int]) -> list[str]:
    pieces, start = [], 0
    for length in lengths:
        pieces.append(text[start : start + length])
        start += length
    return [*pieces, text[start:]]


@given(
    st.text(LETTERS, max_size=20),
    st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=3),
    st.lists(st.integers(0, 6), max_size=8),
)
@example("abbb", ["abbb", "b"], [])
def test_the_answer_is_the_text_before_the_first_stop_in_any_pieces(
    text: str, stops: list[str], lengths: list[int]
) -> None:
    """Bug: with overlapping stop strings, where the answer ended depended on the pieces."""
    matcher, shown = StopMatcher(stops), ""
    for piece in cut(text, lengths):
        shown += matcher.push(piece)
        if matcher.stopped:
            break
    shown += matcher.flush()
    expected = text_before_the_first_stop(text, stops)
    assert matcher.stopped == (expected is not None)
    assert shown == (text if expected is None else expected)


@given(st.text(LETTERS, max_size=20), st.text(LETTERS, min_size=1, max_size=5))
def test_no_more_is_held_back_than_could_become_a_stop(text: str, stop: str) -> None:
    matcher, shown = StopMatcher([stop]), ""
    for letter in text:
        shown += matcher.push(letter)
        if matcher.stopped:
            return
    held = text[len(shown) :]
    assert stop.startswith(held)
    longer = [text[start:] for start in range(len(shown)) if stop.startswith(text[start:])]
    assert longer == []


@given(st.lists(st.text(max_size=5), max_size=6))
def test_without_stops_text_passes_at_once(pieces: list[str]) -> None:
    matcher = StopMatcher(())
    assert [matcher.push(piece) for piece in pieces] == pieces
    assert matcher.flush() == ""


def test_what_was_flushed_is_not_shown_again() -> None:
    matcher = StopMatcher(["abc"])
    assert matcher.push("ab") == ""
    assert (matcher.flush(), matcher.flush()) == ("ab", "")


@pytest.mark.parametrize("stop", ["\n\n", "é", "🙂🙂"])
def test_stops_may_be_any_characters(stop: str) -> None:
    matcher = StopMatcher([stop])
    shown = "".join(matcher.push(character) for character in f"text{stop}")
    assert (shown, matcher.stopped) == ("text", True)
