"""A running answer: the tokens it feeds, the text it shows, and why it ends."""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import pytest
from colm_kernels.decode_attention import MAX_QUERY_TOKENS
from hypothesis import given
from hypothesis import strategies as st

from colm.errors import NotFinite
from colm.events import FinishReason, Token
from colm.sampling import SamplingParams
from colm.text.detokenizer import Detokenizer, TextStream
from decode_node.drafter import Drafter, Drafting, StepTimes
from decode_node.plan import PlanRow
from decode_node.running_answer import RunningAnswer
from decode_node.sampler import Choice
from decode_node.scheduler import Scheduler
from decode_node.step_budget import StepBudget
from tests.tiny import tiny_tokenizer

EOS = 2
TOKENIZER = tiny_tokenizer()
TABLE_M = np.zeros(3, dtype=np.int32)


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text).ids
    return ids


def byte_ids(text: str) -> list[int]:
    """One token for each byte of the text's UTF-8."""
    stand_ins = "".join(piece for piece, _ in TOKENIZER.pre_tokenizer.pre_tokenize_str(text))
    return [TOKENIZER.token_to_id(stand_in) for stand_in in stand_ins]


def answer(
    *,
    max_new_tokens: int = 100,
    stop: tuple[str, ...] = (),
    stop_token_ids: Collection[int] = (EOS,),
    reads_text: bool = True,
    unread_token_ids: Sequence[int] = (17,),
    num_chains: int = 2,
    num_drafts: int = 0,
    sampling: SamplingParams | None = None,
    made_token_ids: Sequence[int] = (),
) -> RunningAnswer:
    return RunningAnswer(
        unread_token_ids=unread_token_ids,
        position=9,
        num_chains=num_chains,
        max_new_tokens=max_new_tokens,
        table_M=TABLE_M,
        sampling=sampling or SamplingParams(stop=stop),
        stop_token_ids=stop_token_ids,
        text_stream=TextStream(Detokenizer(TOKENIZER)) if reads_text else None,
        drafter=DraftsOf(num_drafts) if num_drafts else None,
        made_token_ids_N=made_token_ids,
    )


class DraftsOf(Drafter):
    """Always wants as many drafts, and remembers what became of them."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(Drafting(StepTimes((1, 2), max_tokens=64), num_tokens), num_tokens)
        self.noted: list[tuple[int, bool]] = []

    def num_drafts(self, num_answers: int) -> int:
        assert num_answers == 1
        return self._max_draft_tokens

    def note(self, num_accepted: int, *, was_refused: bool) -> None:
        self.noted.append((num_accepted, was_refused))


class NobodyAsks(StepTimes):
    """Of a node whose answers do not draft."""

    def rounds(self, num_answers: int) -> list[float]:
        raise AssertionError(f"somebody of {num_answers} asked what drafts take")


def chosen(token_id: int) -> Choice:
    return Choice(token_id, -0.5, ((token_id, -0.5),))


def advance(sequence: RunningAnswer, token_ids: Sequence[int]) -> list[Token]:
    """Take tokens until the answer ends; it must not end before the last of them."""
    tokens = []
    for token_id in token_ids:
        assert sequence.finish_reason is None
        tokens += sequence.advance([chosen(token_id)])
    return tokens


def verified(sequence: RunningAnswer, token_ids: Sequence[int]) -> list[Token]:
    """Take a step's tokens, of which all but the last were drafted."""
    for token_id in token_ids[:-1]:
        sequence.add_draft(token_id)
    return sequence.advance([chosen(token_id) for token_id in token_ids])


def shown(sequence: RunningAnswer, tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens) + sequence.tail


def test_the_first_step_reads_the_last_prompt_token() -> None:
    (row,) = answer().next_rows()
    assert (row.token_ids, row.position, row.num_chains, row.num_logits) == ((17,), 9, 2, 1)
    assert row.table_M is TABLE_M


def test_each_step_reads_the_token_before_it_at_the_next_position() -> None:
    sequence = answer()
    advance(sequence, [40, 50])
    (row,) = sequence.next_rows()
    assert (row.token_ids, row.position, sequence.num_new_tokens) == ((50,), 11, 2)


def tokens_of(rows: Sequence[PlanRow]) -> dict[int, int]:
    """What rows read, by its place in the text."""
    return {row.position + i: token_id for row in rows for i, token_id in enumerate(row.token_ids)}


@given(st.integers(1, 90), st.lists(st.integers(1, 40), min_size=1))
def test_a_prompt_in_pieces_is_read_once_in_order_and_asks_for_logits_with_its_last_token(
    num_unread: int, pieces: list[int]
) -> None:
    prompt = tuple(range(100, 100 + num_unread))
    sequence = answer(unread_token_ids=prompt, num_chains=3)
    read: dict[int, int] = {}
    for max_tokens in [*pieces, num_unread]:
        left = sequence.num_unread
        rows = sequence.next_rows(max_tokens)
        assert sum(len(row.token_ids) for row in rows) == min(max_tokens, left)
        assert [sum(row.num_logits for row in rows), rows[0].num_chains] == ([1, 3] if max_tokens >= left else [0, 1])
        assert max(len(row.token_ids) for row in rows) <= MAX_QUERY_TOKENS
        read |= tokens_of(rows)
        if max_tokens >= left:
            break
        sequence.note_read(max_tokens)
    assert read == {9 + i: token_id for i, token_id in enumerate(prompt)}
    advance(sequence, [40])
    assert (sequence.num_unread, sequence.next_rows(1)[0].position) == (1, 9 + num_unread)


def test_a_step_of_fewer_tokens_verifies_fewer_drafts() -> None:
    sequence = answer(num_drafts=3)
    advance(sequence, [40])
    draft(sequence, [50, 60, 70])
    assert sequence.num_drafts == 3
    for max_tokens, expected in ((1, (40,)), (3, (40, 50, 60)), (9, (40, 50, 60, 70))):
        (row,) = sequence.next_rows(max_tokens)
        assert (row.token_ids, row.num_logits) == (expected, len(expected))


@pytest.mark.parametrize("num_unread", [1, 2, 16, 17, 18, 33, 64])
def test_the_first_step_reads_a_prompt_that_the_cache_does_not_hold(num_unread: int) -> None:
    """Once each, in their places: the last at the answer's scale, the others at scale 1 and for the cache alone."""
    prompt = tuple(range(100, 100 + num_unread))
    sequence = answer(unread_token_ids=prompt, num_chains=3)
    last, *earlier = sequence.next_rows()
    assert (last.token_ids, last.position, last.num_chains, last.num_logits) == (prompt[-1:], 9 + num_unread - 1, 3, 1)
    read = {row.position + i: token_id for row in earlier for i, token_id in enumerate(row.token_ids)}
    assert read == {9 + i: token_id for i, token_id in enumerate(prompt[:-1])}
    assert sum(len(row.token_ids) for row in earlier) == num_unread - 1
    assert all((row.num_chains, row.num_logits) == (1, 0) for row in earlier)
    assert max((len(row.token_ids) for row in earlier), default=0) <= MAX_QUERY_TOKENS
    assert all(row.table_M is TABLE_M for row in (last, *earlier))
    advance(sequence, [40])
    (row,) = sequence.next_rows()
    assert (row.token_ids, row.position, row.num_chains) == ((40,), 9 + num_unread, 3)


def test_a_token_carries_what_was_chosen_and_at_which_scale() -> None:
    (token,) = advance(answer(), ids_of("x"))
    assert (token.token_id, token.logprob, token.num_chains) == (ids_of("x")[0], -0.5, 2)
    assert token.top_logprobs == ((ids_of("x")[0], -0.5),)


def test_eos_ends_the_answer_and_is_not_shown() -> None:
    sequence = answer()
    tokens = advance(sequence, [*ids_of("the end"), EOS])
    assert sequence.finish_reason is FinishReason.STOP
    assert shown(sequence, tokens) == "the end"
    assert (tokens[-1].token_id, tokens[-1].text) == (EOS, "")


def test_a_stop_id_ends_the_answer_and_its_text_is_not_shown() -> None:
    (stop_id,) = ids_of("!")
    sequence = answer(stop_token_ids={stop_id})
    tokens = advance(sequence, [*ids_of("stop"), stop_id])
    assert sequence.finish_reason is FinishReason.STOP
    assert shown(sequence, tokens) == "stop"


def test_eos_that_is_ignored_goes_by_without_text() -> None:
    sequence = answer(stop_token_ids=())
    tokens = advance(sequence, [*ids_of("on"), EOS, *ids_of("ward")])
    assert sequence.finish_reason is None
    assert shown(sequence, tokens) == "onward"


def test_the_last_allowed_token_ends_the_answer_by_length_and_is_shown() -> None:
    ids = ids_of("abc")
    sequence = answer(max_new_tokens=len(ids))
    tokens = advance(sequence, ids)
    assert sequence.finish_reason is FinishReason.LENGTH
    assert shown(sequence, tokens) == "abc"


def test_eos_as_the_last_allowed_token_counts_as_stop() -> None:
    sequence = answer(max_new_tokens=1)
    advance(sequence, [EOS])
    assert sequence.finish_reason is FinishReason.STOP


def test_a_stop_string_across_tokens_ends_the_answer_before_it() -> None:
    sequence = answer(stop=("END",))
    tokens = advance(sequence, byte_ids("resultEND"))
    assert sequence.finish_reason is FinishReason.STOP
    assert shown(sequence, tokens) == "result"


def test_a_stop_string_counts_where_it_begins_behind_the_least_length() -> None:
    sequence = answer(sampling=SamplingParams(stop=("END",), min_tokens=5))
    tokens = advance(sequence, byte_ids("ENDENDEND"))
    assert sequence.finish_reason is FinishReason.STOP
    assert shown(sequence, tokens) == "ENDEND"


def test_text_that_began_a_stop_string_comes_with_the_end_by_eos() -> None:
    sequence = answer(stop=("END",))
    tokens = advance(sequence, [*byte_ids("theEN"), EOS])
    assert "".join(token.text for token in tokens) == "the"
    assert sequence.tail == "EN"


def test_text_that_began_a_stop_string_comes_with_the_end_by_length() -> None:
    ids = byte_ids("theEN")
    sequence = answer(stop=("END",), max_new_tokens=len(ids))
    tokens = advance(sequence, ids)
    assert sequence.finish_reason is FinishReason.LENGTH
    assert ("".join(token.text for token in tokens), sequence.tail) == ("the", "EN")


def test_a_character_appears_with_its_last_byte() -> None:
    tokens = advance(answer(), byte_ids("é"))
    assert [token.text for token in tokens] == ["", "é"]


@pytest.mark.parametrize("max_new_tokens", [1, 100], ids=["by length", "by eos"])
def test_half_a_character_at_the_end_becomes_a_replacement_character(max_new_tokens: int) -> None:
    sequence = answer(max_new_tokens=max_new_tokens)
    ids = byte_ids("é")[:1]
    tokens = advance(sequence, ids if max_new_tokens == 1 else [*ids, EOS])
    assert shown(sequence, tokens) == "\N{REPLACEMENT CHARACTER}"


def test_a_stop_string_completed_by_the_last_flush_counts_as_stop() -> None:
    sequence = answer(stop=("x\N{REPLACEMENT CHARACTER}",), max_new_tokens=2)
    tokens = advance(sequence, [*ids_of("x"), byte_ids("é")[0]])
    assert sequence.finish_reason is FinishReason.STOP
    assert shown(sequence, tokens) == ""


def test_after_a_stop_string_nothing_is_left_to_show() -> None:
    sequence = answer(stop=("END",), max_new_tokens=3)
    advance(sequence, byte_ids("END"))
    assert (sequence.finish_reason, sequence.tail) == (FinishReason.STOP, "")


def test_without_a_tokenizer_tokens_carry_no_text() -> None:
    sequence = answer(reads_text=False, max_new_tokens=2)
    tokens = advance(sequence, [40, 50])
    assert (shown(sequence, tokens), sequence.finish_reason) == ("", FinishReason.LENGTH)


def draft(sequence: RunningAnswer, token_ids: Sequence[int]) -> None:
    """Draft these tokens, as long as the answer asks for drafts."""
    for token_id in token_ids:
        if sequence.draft_row(1) is not None:
            sequence.add_draft(token_id)


def test_the_first_token_comes_without_drafts_and_then_chain_1_drafts_token_by_token() -> None:
    sequence = answer(num_drafts=3)
    assert sequence.draft_row(1) is None
    advance(sequence, [40])
    for place, (last, next_draft) in enumerate([(40, 50), (50, 60), (60, 70)]):
        row = sequence.draft_row(1)
        assert row is not None
        assert (row.token_ids, row.position, row.num_chains, row.num_logits) == ((last,), 10 + place, 1, 1)
        assert row.table_M is TABLE_M
        sequence.add_draft(next_draft)
    assert sequence.draft_row(1) is None
    (row,) = sequence.next_rows()
    assert (row.token_ids, row.position, row.num_chains, row.num_logits) == ((40, 50, 60, 70), 10, 2, 4)
    assert list(row.chosen_positions) == [11, 12, 13, 14]


@pytest.mark.parametrize("num_right", [0, 1, 2, 3])
def test_drafts_count_up_to_the_first_that_is_another_than_what_all_chains_choose(num_right: int) -> None:
    right = [50, 60, 70]
    sequence = answer(num_drafts=3)
    advance(sequence, [40])
    draft(sequence, [*right[:num_right], *(token_id + 1 for token_id in right[num_right:])])
    tokens = sequence.advance([chosen(token_id) for token_id in [*right, 80]])
    taken = [*right, 80][: num_right + 1]
    assert [token.token_id for token in tokens] == taken
    assert (sequence.num_draft_tokens, sequence.num_accepted_tokens) == (3, num_right)
    assert sequence._drafter.noted == [(num_right, num_right < 3)]  # type: ignore[union-attr]
    (row,) = sequence.next_rows()
    assert (row.token_ids, row.position, sequence.num_new_tokens) == ((taken[-1],), 10 + len(taken), 1 + len(taken))


def test_drafts_that_no_step_has_read_are_forgotten() -> None:
    sequence = answer(num_drafts=3)
    advance(sequence, [40])
    draft(sequence, [50, 60, 70])
    tokens = sequence.advance([chosen(50), chosen(60)])
    assert [token.token_id for token in tokens] == [50, 60]
    assert (sequence.num_draft_tokens, sequence.num_accepted_tokens) == (1, 1)
    (row,) = sequence.next_rows()
    assert (row.token_ids, row.position) == ((60,), 12)


def test_no_draft_lies_behind_the_last_token_that_the_answer_may_have() -> None:
    """Its pages end there, and so may the model's context."""
    sequence = answer(num_drafts=15, max_new_tokens=5)
    advance(sequence, [40])
    draft(sequence, range(100, 115))
    (row,) = sequence.next_rows()
    assert len(row.token_ids) == 1 + 3
    assert row.position + len(row.token_ids) == 9 + 5
    assert len(sequence.advance([chosen(token_id) for token_id in (100, 101, 102, 7)])) == 4
    assert sequence.finish_reason is FinishReason.LENGTH


def test_nothing_is_drafted_behind_a_draft_that_would_end_the_answer_nor_where_chain_1_chose_nothing() -> None:
    for outcome in (EOS, NotFinite("overflow")):
        sequence = answer(num_drafts=9)
        advance(sequence, [40])
        draft(sequence, [50])
        sequence.add_draft(outcome)
        assert sequence.draft_row(1) is None
        assert len(sequence.next_rows()[0].token_ids) == 2 + isinstance(outcome, int)
        sequence.advance([chosen(51)])
        assert sequence.draft_row(1) is not None


def test_an_error_behind_a_draft_that_was_refused_is_nobodys_and_another_ends_the_answer() -> None:
    for right, error in ((50, True), (51, False)):
        sequence = answer(num_drafts=1)
        advance(sequence, [40])
        draft(sequence, [50])
        tokens = sequence.advance([chosen(right), NotFinite("overflow")])
        assert [token.token_id for token in tokens] == [right]
        assert (sequence.error is not None, sequence.finish_reason) == (error, None)


def test_what_an_end_cuts_off_is_no_accepted_token_and_no_refusal() -> None:
    ids = ids_of("end")
    sequence = answer(num_drafts=9)
    advance(sequence, [40])
    draft(sequence, [*ids, EOS])
    tokens = sequence.advance([chosen(token_id) for token_id in [*ids, EOS, 50]])
    assert [token.token_id for token in tokens] == [*ids, EOS]
    assert (sequence.num_draft_tokens, sequence.num_accepted_tokens) == (len(ids) + 1,) * 2
    stopped = answer(num_drafts=9, stop=("an",))
    advance(stopped, [40])
    drafts = byte_ids("a and more")
    draft(stopped, drafts)
    tokens = stopped.advance([chosen(token_id) for token_id in [*drafts, 50]])
    assert len(tokens) == stopped.num_accepted_tokens == len("a an")
    assert stopped.num_draft_tokens == 9
    assert stopped._drafter.noted == [(len("a an"), False)]  # type: ignore[union-attr]
    assert stopped.num_new_tokens == 1 + len("a an")


def test_several_choices_end_in_the_middle_and_what_follows_is_dropped() -> None:
    sequence = answer(num_drafts=15)
    tokens = verified(sequence, [*ids_of("end"), EOS, *ids_of("beyond")])
    assert [token.token_id for token in tokens] == [*ids_of("end"), EOS]
    assert (shown(sequence, tokens), sequence.num_new_tokens) == ("end", len(tokens))
    assert sequence.finish_reason is FinishReason.STOP


def test_after_several_choices_the_next_step_reads_the_last_of_them() -> None:
    sequence = answer()
    verified(sequence, [40, 50, 60])
    (row,) = sequence.next_rows()
    assert (row.token_ids, row.position, sequence.num_new_tokens) == ((60,), 12, 3)


TEXT = byte_ids("a result, an end: é and END and more")


@given(
    st.lists(st.integers(1, 16), min_size=len(TEXT), max_size=len(TEXT)),
    st.sampled_from([(), ("END",), ("end:", "END"), ("\N{REPLACEMENT CHARACTER}", "é")]),
    st.sets(st.sampled_from(TEXT), max_size=1),
    st.integers(1, len(TEXT)),
)
def test_an_answer_is_the_same_however_its_tokens_are_divided_into_steps(
    counts: list[int], stop: tuple[str, ...], stop_token_ids: set[int], max_new_tokens: int
) -> None:
    def of(counts: Sequence[int]) -> tuple[list[Token], str, FinishReason | None, int]:
        sequence = answer(max_new_tokens=max_new_tokens, stop=stop, stop_token_ids=stop_token_ids)
        tokens: list[Token] = []
        rest = TEXT
        for count in counts:
            if sequence.finish_reason is None:
                tokens += verified(sequence, rest[:count])
                rest = rest[count:]
        return tokens, sequence.tail, sequence.finish_reason, sequence.num_new_tokens

    assert of(counts) == of([1] * len(TEXT))


@given(
    token_ids=st.lists(st.integers(3, 269), min_size=1, max_size=40),
    num_made=st.integers(0, 40),
    num_unread=st.integers(1, 20),
    piece=st.integers(1, 40),
    stop=st.sampled_from(["", "th", "\u00e9"]),
    seed=st.integers(0, 3),
)
def test_an_answer_that_another_node_began_goes_on_as_it_would_have_there(
    token_ids: list[int], num_made: int, num_unread: int, piece: int, stop: str, seed: int
) -> None:
    """The same text, end and random numbers; each token before the last is read once, in its place, by chain 1."""
    sampling = SamplingParams(stop=(stop,) if stop else (), temperature=1.0, seed=seed)
    prompt = range(100, 100 + num_unread)
    undisturbed = answer(unread_token_ids=prompt, sampling=sampling)
    draws, tokens = [], []
    for token_id in token_ids:
        draws.append([undisturbed.sampler.uniform(each) for each in undisturbed.next_rows()[0].chosen_positions])
        tokens += undisturbed.advance([chosen(token_id)])
        if undisturbed.finish_reason is not None:
            break
    made = [token.token_id for token in tokens[:num_made]]
    going_on = answer(unread_token_ids=prompt, sampling=sampling, made_token_ids=made)
    read: dict[int, int] = {}
    for number in range(len(made), len(tokens)):
        while not (rows := going_on.next_rows(piece))[0].num_logits:
            assert all(row.num_chains == 1 for row in rows)
            read |= tokens_of(rows)
            going_on.note_read(piece)
        read |= tokens_of(rows)
        assert rows[0].num_chains == 2
        assert [going_on.sampler.uniform(each) for each in rows[0].chosen_positions] == draws[number]
        assert going_on.advance([chosen(tokens[number].token_id)]) == [tokens[number]]
    if len(made) < len(tokens):
        known = [*prompt, *(token.token_id for token in tokens[:-1])]
        assert read == {9 + i: token_id for i, token_id in enumerate(known)}
    assert (going_on.finish_reason, going_on.num_new_tokens) == (undisturbed.finish_reason, len(tokens))
    assert going_on.tail == undisturbed.tail


@given(
    answers=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 2), st.integers(1, 6)), min_size=1, max_size=5),
    max_batch_size=st.integers(1, 4),
)
def test_answers_that_may_not_draft_are_planned_as_on_a_node_that_never_drafts_and_nobody_asks_for_times(
    answers: list[tuple[int, int, int]], max_batch_size: int
) -> None:
    drafting = Drafting(NobodyAsks((1, 2), max_tokens=64), 8)

    def plans(drafters: Callable[[], Drafter | None]) -> list[list[tuple[tuple[int, ...], int, int, bool]]]:
        scheduler: Scheduler[RunningAnswer] = Scheduler(
            max_batch_size=max_batch_size, budget=StepBudget(step_tokens=8, max_tokens=16)
        )
        for num_unread, num_chains, num_new in answers:
            each = answer(unread_token_ids=range(num_unread), num_chains=num_chains, max_new_tokens=num_new)
            each._drafter = drafters()
            scheduler.join(each)
        planned = []
        while (step := scheduler.begin_step()) is not None:
            rows = step.plan.rows
            planned.append([(row.token_ids, row.position, row.num_chains, row.is_draft) for row in rows])
            for each in dict.fromkeys(step.answers):
                if any(row.num_logits for row, of in zip(rows, step.answers, strict=True) if of is each):
                    each.advance([chosen(17)])
                else:
                    each.note_read(step.num_tokens(each))
                if each.finish_reason is not None:
                    scheduler.leave(each)
            scheduler.end_step()
        return planned

    assert plans(lambda: drafting.drafter(0)) == plans(lambda: None)
