"""What a terminal shows of an answer while it waits."""

import sys

import pytest

from cluster.cli.answer_view import AnswerView
from colm.events import (
    Accepted,
    Event,
    Finished,
    FinishReason,
    ProvisionalToken,
    Queued,
    Timings,
    Token,
    Usage,
    WaitsFor,
)

USAGE = Usage(
    num_prompt_tokens=9,
    num_prefill_tokens=8,
    num_decode_prompt_tokens=1,
    num_new_tokens=1,
    kv_received_bytes=0,
    kv_effective_bytes=0,
    num_kv_streams=1,
)
TIMINGS = Timings(queue_s=0.0, prefill_s=0.5, first_token_s=0.6, decode_s=0.0)


@pytest.mark.parametrize(
    ("num_ahead", "estimated_wait_s", "place"),
    [(0, None, "next"), (3, None, "3 ahead"), (0, 7.4, "next, about 0:00:07"), (2, 3725.0, "2 ahead, about 1:02:05")],
)
def test_a_wait_shows_its_place_and_its_estimated_end(
    num_ahead: int, estimated_wait_s: float | None, place: str
) -> None:
    view = AnswerView(stream_text=False)
    events: list[Event] = [
        Accepted(request_id="r", model="m", num_prompt_tokens=9, num_chains=1, max_new_tokens=1, timeout_s=1.0),
        Queued(waits_for=WaitsFor.PREFILL_NODE, num_ahead=num_ahead, estimated_wait_s=estimated_wait_s),
    ]
    for event in events:
        view.see(event)
    (task,) = view._progress.tasks
    assert task.description == "waiting for a prefill node"
    assert task.fields["speed"] == place


@pytest.mark.parametrize(
    ("num_prefill_tokens", "num_kept", "num_new_tokens", "num_draft_tokens", "line"),
    [
        (
            8,
            0,
            3,
            0,
            "9 prompt tokens, first token after 0.00 s (prefill 16.0 tokens/s); 3 new tokens at 8.0 tokens/s on 1 ",
        ),
        (8, 6, 1, 0, "9 prompt tokens, 6 of them kept, first token after 0.00 s (prefill 4.0 tokens/s); "),
        (8, 8, 1, 0, "9 prompt tokens, 8 of them kept, first token after 0.00 s; 1 new tokens"),
        (0, 0, 1, 0, "9 prompt tokens, first token after 0.00 s; 1 new tokens on 1 chains, ended by length\n"),
        (0, 0, 3, 2, "on 1 chains, ended by length; 1 of 2 drafts accepted\n"),
    ],
)
def test_the_last_line_has_no_speed_of_what_did_not_happen(
    num_prefill_tokens: int,
    num_kept: int,
    num_new_tokens: int,
    num_draft_tokens: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Defect: a prompt without a prefill was summed up as "prefill None tokens/s"."""
    view = AnswerView(stream_text=False)
    view.see(Accepted(request_id="r", model="m", num_prompt_tokens=9, num_chains=1, max_new_tokens=3, timeout_s=1.0))
    usage = Usage(
        num_prompt_tokens=9,
        num_prefill_tokens=num_prefill_tokens,
        num_decode_prompt_tokens=9 - num_prefill_tokens,
        num_new_tokens=num_new_tokens,
        kv_received_bytes=0,
        kv_effective_bytes=0,
        num_kv_streams=0,
        num_draft_tokens=num_draft_tokens,
        num_accepted_tokens=num_draft_tokens // 2,
        num_prefill_cached_tokens=num_kept,
    )
    prefill_s = 0.5 if num_prefill_tokens else 0.0
    timings = Timings(queue_s=0.0, prefill_s=prefill_s, first_token_s=0.6, decode_s=0.25)
    view.see(Finished(reason=FinishReason.LENGTH, usage=usage, timings=timings, text=""))
    view.print_summary()
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("is_same", [True, False])
def test_a_provisional_word_is_shown_dimmed_and_taken_back_by_the_first_one(
    is_same: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = AnswerView(stream_text=True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    word = "same" if is_same else "other"
    for event in (
        Accepted(request_id="r", model="m", num_prompt_tokens=9, num_chains=2, max_new_tokens=3, timeout_s=1.0),
        ProvisionalToken(token_id=4, text="same"),
        Token(token_id=4 if is_same else 5, text=word, logprob=0.0, num_chains=2, confirms_provisional=is_same),
        Finished(reason=FinishReason.LENGTH, usage=USAGE, timings=TIMINGS, text="."),
    ):
        view.see(event)
    assert capsys.readouterr().out == f"\x1b[2msame\x1b[22m\b\b\b\b\x1b[K{word}."
    record = view.record()
    assert (record["text"], record["provisional_text"]) == (f"{word}.", "same")
    assert record["provisional_token"] == ("confirmed" if is_same else "replaced")
    assert isinstance(record["provisional_token_s"], float)


@pytest.mark.parametrize(("is_terminal", "text"), [(False, "same"), (True, "two\nlines")])
def test_a_provisional_word_that_could_not_be_taken_back_is_not_shown(
    is_terminal: bool, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = AnswerView(stream_text=True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    view.see(ProvisionalToken(token_id=4, text=text))
    view.see(Token(token_id=5, text="word", logprob=0.0, num_chains=2, confirms_provisional=False))
    assert capsys.readouterr().out == "word"
