"""What a soak makes of what it sees: an answer that is not the known one never passes."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from colm.checkpoint import prefill_tensor_names
from colm.errors import CapacityExceeded, ColmError, DeadlineExceeded, ModelReplaced, PeerFailed, PeerUnavailable
from colm.events import Accepted, Event, Finished, FinishReason, Reconnecting, Timings, Token, Usage
from colm.model import parameter_shapes
from colm.nodes import ModelStatus
from tests.soak.changes import other_model
from tests.soak.questions import End, Question, questions
from tests.soak.watch import IN_CHANGE, WHOLE, Memory, _slope
from tests.tiny import tiny_checkpoint

QUESTION = Question(number=0, options={"token_ids": [3]}, expected={"a": [7, 8, 9], "b": [7, 5, 6]})
USAGE = Usage(
    num_prompt_tokens=1,
    num_prefill_tokens=0,
    num_decode_prompt_tokens=1,
    num_new_tokens=3,
    kv_received_bytes=0,
    kv_effective_bytes=0,
    num_kv_streams=0,
)
FINISHED = Finished(
    reason=FinishReason.LENGTH,
    usage=USAGE,
    timings=Timings(queue_s=0.0, prefill_s=0.0, first_token_s=0.0, decode_s=0.0),
    text="",
)


def tokens(*ids: int) -> list[Event]:
    return [Token(token_id=token_id, text="", logprob=0.0, num_chains=1) for token_id in ids]


def answer(*events: Event, error: Exception | None = None) -> Callable[[], Iterator[Event]]:
    def events_of() -> Iterator[Event]:
        yield from events
        if error is not None:
            raise error

    return events_of


def accepted(revision: str) -> Accepted:
    return Accepted(
        request_id="r", model="m", num_prompt_tokens=1, num_chains=1, max_new_tokens=3, timeout_s=9.0, revision=revision
    )


LOST = Reconnecting(in_s=0.1, cause="lost")
CASES = {
    "the answer": (answer(*tokens(7, 8, 9), FINISHED), End.RIGHT),
    "another answer": (answer(*tokens(7, 8, 8), FINISHED), End.WRONG),
    "too short an answer": (answer(*tokens(7, 8), FINISHED), End.WRONG),
    "an answer twice": (answer(*tokens(7, 8, 9), FINISHED, FINISHED), End.LOST),
    "the other model's answer": (answer(accepted("b"), *tokens(7, 5, 6), FINISHED), End.RIGHT),
    "of another model than accepted it": (answer(accepted("a"), *tokens(7, 5, 6), FINISHED), End.WRONG),
    "of an unknown model": (answer(accepted("c"), *tokens(7, 8, 9), FINISHED), End.WRONG),
    "of both models": (answer(accepted("a"), *tokens(7), LOST, *tokens(5, 9), FINISHED), End.WRONG),
    "made anew by another model": (answer(accepted("a"), LOST, *tokens(7, 5, 6), FINISHED), End.RIGHT),
    "a model replaced": (answer(accepted("a"), *tokens(7), LOST, error=ModelReplaced("gone")), End.REPLACED),
    "no end": (answer(*tokens(7, 8, 9)), End.LOST),
    "a process lost": (answer(*tokens(7, 8), error=PeerUnavailable("lost")), End.UNAVAILABLE),
    "a wrong token, then a process lost": (answer(*tokens(7, 9), error=PeerUnavailable("lost")), End.WRONG),
    "no room": (answer(error=CapacityExceeded("full")), End.REFUSED),
    "no time": (answer(error=DeadlineExceeded("late")), End.DEADLINE),
    "a defect": (answer(error=PeerFailed("internal error")), End.LOST),
    "something of ours": (answer(error=ColmError("internal error")), End.LOST),
    "something of nobody's": (answer(error=RuntimeError("a defect")), End.LOST),
}


@pytest.mark.parametrize("case", CASES)
def test_a_request_ends_in_one_way_and_a_wrong_token_is_wrong_however_it_ends(case: str) -> None:
    events, end = CASES[case]
    assert QUESTION.judge(events()).end is end


def test_the_other_model_has_the_same_keys_and_values_and_other_logits(tmp_path: Path) -> None:
    first = tiny_checkpoint(tmp_path / "first", tokenizer=True)
    other = other_model(tmp_path / "other", first)
    names = parameter_shapes(first.config)
    before, after = first.tensors(names), other.tensors(names)
    same = {name for name in names if torch.equal(before[name], after[name])}
    assert same == prefill_tensor_names(first.config) < {*names}
    assert (other.text, other.tokenizer_json()) == (first.text, first.tokenizer_json())


def test_the_cluster_is_of_another_size_after_a_change_and_that_is_no_leak() -> None:
    memory = Memory()
    for num_changes, level in enumerate((300, 900, 500)):
        start_s = 300.0 * num_changes
        memory.samples[IN_CHANGE if num_changes % 2 else WHOLE][num_changes] = [
            (start_s + t, level << 20) for t in range(300)
        ]
    assert memory.summary(WHOLE, run_s=900.0)["is_flat"] is True
    assert memory.summary(IN_CHANGE, run_s=900.0)["peak_bytes"] == 900 << 20


def test_the_same_seed_asks_the_same_of_every_kind() -> None:
    model = ModelStatus(name="m", chains=(4, 2, 2), max_context_tokens=8192, fingerprint="f", reads_text=True)
    asked = questions(random.Random(1), 60, model)
    assert asked == questions(random.Random(1), 60, model)
    options = [question.options for question in asked]
    assert {each["num_chains"] for each in options} == {1, 2, 3}
    assert {each["attention"] for each in options} == {"dense", "sparse"}
    assert {each["sampling"].temperature for each in options} == {0.0, 0.8}
    assert min(map(len, (each["token_ids"] for each in options))) < 120
    assert max(map(len, (each["token_ids"] for each in options))) >= 3000


def test_memory_that_grows_within_lives_is_seen_and_another_process_of_another_size_is_not() -> None:
    flat = [[(t, 500.0) for t in range(100)], [(t, 900.0) for t in range(100, 200)]]
    growing = [[(t, level + 2.0 * t) for t in range(100)] for level in (500.0, 100.0)]
    assert _slope(flat) == 0.0  # type: ignore[arg-type]
    assert _slope(growing) == pytest.approx(2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bytes_per_s", "is_flat"), [(0, True), (1 << 20, False)])
def test_a_leak_of_a_mebibyte_a_second_is_no_flat_memory(bytes_per_s: int, is_flat: bool) -> None:
    memory = Memory()
    memory.samples["decode"][1] = [(float(t), (300 << 20) + bytes_per_s * t) for t in range(300)]
    assert memory.summary("decode", run_s=300.0)["is_flat"] is is_flat
    assert memory.summary("prefill", run_s=300.0)["is_flat"] is None
