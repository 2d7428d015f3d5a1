"""Answers that must be the same, with and without a fault."""

import torch
from colm_kernels import native

from colm.events import Event, Finished, Token


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Token | Finished))


def assert_same_answer(events: list[Event], undisturbed: list[Event]) -> None:
    """The same tokens, each once, and the same end but for its times and its node's own transfers."""
    tokens, wanted = ([event for event in each if isinstance(event, Token)] for each in (events, undisturbed))
    assert [token.token_id for token in tokens] == [token.token_id for token in wanted]
    assert [token.text for token in tokens] == [token.text for token in wanted]
    if native.default_variant(torch.float32) != "torch":  # whose products depend on the number of rows
        assert tokens == wanted
    end, wanted_end = events[-1], undisturbed[-1]
    assert isinstance(end, Finished)
    assert isinstance(wanted_end, Finished)
    assert (end.reason, end.text) == (wanted_end.reason, wanted_end.text)
    for name in ("num_prompt_tokens", "num_prefill_tokens", "num_decode_prompt_tokens", "num_new_tokens"):
        assert getattr(end.usage, name) == getattr(wanted_end.usage, name)
