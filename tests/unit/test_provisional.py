"""What a reader is told of provisional tokens, whatever is sent."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm.events import Event, PrefillProgress, ProvisionalToken, Token
from colm.provisional import ProvisionalOnce

PROGRESS = PrefillProgress(num_tokens_done=1, num_tokens_total=2)


def token(token_id: int, confirms_provisional: bool | None = None) -> Token:
    return Token(token_id=token_id, text="", logprob=0.0, num_chains=2, confirms_provisional=confirms_provisional)


IDS = st.integers(0, 2)
EVENTS = st.lists(
    st.just(PROGRESS)
    | st.builds(ProvisionalToken, token_id=IDS)
    | st.builds(token, IDS, st.none() | st.booleans()),
    max_size=12,
)  # fmt: skip


@given(sent=EVENTS, has_begun=st.booleans())
def test_at_most_one_comes_before_the_first_token_which_alone_says_what_became_of_it(
    sent: list[Event], has_begun: bool
) -> None:
    """Whatever nodes that were lost have said meanwhile: what a reader has heard is what counts."""
    once = ProvisionalOnce(has_begun=has_begun)
    heard = [event for event in map(once.see, sent) if event is not None]
    guesses = [event for event in heard if isinstance(event, ProvisionalToken)]
    tokens = [event for event in heard if isinstance(event, Token)]
    assert len(guesses) <= (not has_begun)
    kinds = [type(event) for event in heard]
    if guesses:
        assert Token not in kinds[: kinds.index(ProvisionalToken)]
    plain = [replace(event, confirms_provisional=None) for event in sent if isinstance(event, Token)]
    assert [replace(event, confirms_provisional=None) for event in tokens] == plain
    assert heard.count(PROGRESS) == sent.count(PROGRESS)
    outcomes = [event.confirms_provisional for event in tokens]
    expected = [guess.token_id == tokens[0].token_id for guess in guesses if tokens] or [None]
    assert outcomes == [*expected, *[None] * len(tokens)][: len(tokens)]


@pytest.mark.parametrize("event", [PROGRESS, token(3)])
def test_an_event_that_is_right_already_is_passed_on_as_it_is(event: Event) -> None:
    assert ProvisionalOnce().see(event) is event
