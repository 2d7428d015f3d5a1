"""Answers that are held to a JSON schema or a regular expression, whatever a model would rather say.

Shapes: V vocabulary.
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from colm.checkpoint import Checkpoint
from colm.errors import ColmError, InvalidRequest
from colm.events import FinishReason, Token
from colm.sampling import ANY_JSON_OBJECT, MAX_CONSTRAINT_CHARS, Constraint, SamplingParams
from colm.text.detokenizer import Detokenizer, TextStream
from colm.text.tokenizer import Tokenizer
from decode_node import grammar
from decode_node.constraint import ConstrainedText
from decode_node.grammar import MAX_KEPT, Grammars
from decode_node.running_answer import RunningAnswer
from decode_node.sampler import Choice, choose
from tests.constraints import EOS, TOKENIZER, VOCAB_SIZE, grammar_of
from tests.tiny import tiny_checkpoint

TABLE_M = np.zeros(3, dtype=np.int32)
PROMPT = (5, 6)


def schema(value: Any) -> Constraint:
    return Constraint(kind="json_schema", text=json.dumps(value))


def regex(text: str) -> Constraint:
    return Constraint(kind="regex", text=text)


def answer(
    constraint: Constraint,
    made_token_ids: Sequence[int] = (),
    *,
    sampling: SamplingParams | None = None,
    max_new_tokens: int = 80,
    stop_token_ids: Sequence[int] = (EOS,),
) -> RunningAnswer:
    return RunningAnswer(
        unread_token_ids=PROMPT,
        position=0,
        num_chains=2,
        max_new_tokens=max_new_tokens,
        table_M=TABLE_M,
        sampling=sampling or SamplingParams(),
        stop_token_ids=stop_token_ids,
        text_stream=TextStream(Detokenizer(TOKENIZER), keeps_first_space=True),
        constrained=ConstrainedText(grammar_of(constraint)),
        made_token_ids_N=made_token_ids,
    )


def logits_of(seed: int, position: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What a model that cares for no grammar would say."""
    return np.random.default_rng((seed, position)).normal(size=VOCAB_SIZE).astype(np.float32) * 5


def chosen(sequence: RunningAnswer, positions: Sequence[int], seed: int) -> list[Choice | ColmError]:
    logits_QV = torch.from_numpy(np.stack([logits_of(seed, position) for position in positions]))
    return choose([sequence.sampler] * len(positions), positions, logits_QV)


def step(sequence: RunningAnswer, seed: int, drafts: Sequence[int] = ()) -> list[Token]:
    """One step of an answer behind some drafts."""
    for draft in drafts:
        sequence.add_draft(draft)
    first = len(PROMPT) + sequence.num_new_tokens
    return sequence.advance(chosen(sequence, range(first, first + len(drafts) + 1), seed))


def said(sequence: RunningAnswer, seed: int, tokens: Sequence[Token] = ()) -> tuple[str, list[Token]]:
    """The whole answer, one token a step."""
    taken = list(tokens)
    while sequence.finish_reason is None:
        assert sequence.error is None
        taken += step(sequence, seed)
    return "".join(token.text for token in taken) + sequence.tail, taken


LEAVES = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": -3, "maximum": 120},
        {"type": "string", "maxLength": 4},
        {"type": "string", "pattern": "^[ab]{1,3}$"},
        {"enum": ["the", "é", 7, None]},
        {"const": {"a": [1]}},
    ]
)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    objects = st.dictionaries(st.sampled_from(["a", "b", "the"]), inner, max_size=3).flatmap(
        lambda properties: st.sets(st.sampled_from(["a", "b", "the"])).map(
            lambda names: {
                "type": "object",
                "properties": properties,
                "required": sorted(names & properties.keys()),
                "additionalProperties": False,
            }
        )
    )
    arrays = inner.map(lambda items: {"type": "array", "items": items, "maxItems": 2})
    unions = st.lists(inner, min_size=1, max_size=2).map(lambda several: {"anyOf": several})
    return objects | arrays | unions


SCHEMAS = st.recursive(LEAVES, nested, max_leaves=4)


@settings(max_examples=60, deadline=None)
@given(SCHEMAS, st.integers(0, 999), st.sampled_from([0.0, 1.0]))
def test_an_answer_is_json_of_its_schema_unless_its_length_cuts_it(asked: Any, seed: int, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=seed, repetition_penalty=1.3, logit_bias=((EOS, 20.0),))
    sequence = answer(schema(asked), sampling=params)
    text, tokens = said(sequence, seed)
    if sequence.finish_reason is FinishReason.STOP:
        Draft202012Validator(asked).validate(json.loads(text))
    else:
        assert len(tokens) == 80


LIKELY_IDS = TOKENIZER.encode('{}"ab1 nt').ids
"""Drafts that a grammar often allows."""
REGEXES = ("(yes|no)", "[ab]{2,5}c?", "é*end", " ?[0-9]{1,3}( the)?", "(.|\n){0,9}")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(REGEXES).map(regex) | SCHEMAS.map(schema),
    st.integers(0, 99),
    st.lists(st.lists(st.sampled_from([-1, -1, -1, *LIKELY_IDS, EOS, VOCAB_SIZE - 1]), max_size=4), max_size=6),
    st.integers(0, 30),
)
def test_drafts_and_lost_nodes_change_no_token_of_it(
    constraint: Constraint, seed: int, wishes: list[list[int]], cut: int
) -> None:
    """Drafts that are right (-1), wrong, or none that the grammar allows; then another node goes on."""
    params = SamplingParams(temperature=1.0, seed=seed, min_tokens=2, presence_penalty=0.5, top_logprobs=2)
    plain = answer(constraint, sampling=params, max_new_tokens=40)
    text, tokens = said(plain, seed)
    if constraint.kind == "regex" and plain.finish_reason is FinishReason.STOP:
        assert re.fullmatch(constraint.text, text)
    drafted, taken = answer(constraint, sampling=params, max_new_tokens=40), list[Token]()
    for wish in wishes:
        room = len(tokens) - len(taken)
        right = [token.token_id for token in tokens[len(taken) :]]
        drafts = [right[place] if each < 0 else each for place, each in enumerate(wish[: max(0, room - 1)])]
        if drafted.finish_reason is None:
            taken += step(drafted, seed, drafts)
            assert drafted.error is None
    assert said(drafted, seed, taken) == (text, tokens)
    assert drafted.finish_reason is plain.finish_reason
    made = [token.token_id for token in tokens[: min(cut, len(tokens) - 1)]]
    going_on = answer(constraint, made, sampling=params, max_new_tokens=40)
    assert said(going_on, seed, tokens[: len(made)]) == (text, tokens)


def ends(constraint: Constraint, made: str, **options: Any) -> bool:
    """Whether the model, which would end at once, may end behind this text."""
    sequence = answer(constraint, TOKENIZER.encode(made).ids, **options)
    if sequence.finish_reason is not None:
        return True
    logits_V = np.eye(VOCAB_SIZE, dtype=np.float32)[EOS]
    position = len(PROMPT) + sequence.num_new_tokens
    (outcome,) = choose([sequence.sampler], [position], torch.from_numpy(logits_V[None]))
    assert isinstance(outcome, Choice)
    return outcome.token_id == EOS


def test_the_model_ends_an_answer_only_where_it_is_complete() -> None:
    for constraint, complete, incomplete in (
        (regex("ab(cd)?"), ("ab", "abcd"), ("", "a", "abc")),
        (ANY_JSON_OBJECT, ('{"a": 1}', "{}"), ("", "{", '{"a": 1')),
    ):
        assert all(ends(constraint, made) for made in complete)
        assert not any(ends(constraint, made) for made in incomplete)


def test_where_nothing_can_follow_the_answer_has_ended_even_without_an_end_token() -> None:
    """A model that has none, or one that was asked to pass over its own."""
    sequence = answer(regex("(yes|no)"), stop_token_ids=())
    text, _ = said(sequence, 1)
    assert text in ("yes", "no")
    assert sequence.finish_reason is FinishReason.STOP


def test_the_least_length_counts_unless_nothing_else_can_follow() -> None:
    assert not ends(regex("a*"), "aa", sampling=SamplingParams(min_tokens=3))
    assert ends(regex("a{2}"), "aa", sampling=SamplingParams(min_tokens=3))


def test_a_stop_string_cuts_what_the_grammar_allows() -> None:
    sequence = answer(regex("one END two"), sampling=SamplingParams(stop=("END",)))
    text, _ = said(sequence, 1)
    assert (text, sequence.finish_reason) == ("one ", FinishReason.STOP)


def test_log_probabilities_are_the_models_own() -> None:
    sequence = answer(regex("a+"), sampling=SamplingParams(top_logprobs=3))
    (token,) = step(sequence, 1)
    logprobs_V = torch.from_numpy(logits_of(1, len(PROMPT))).log_softmax(dim=0)
    assert token.logprob == float(logprobs_V[token.token_id])
    assert [token_id for token_id, _ in token.top_logprobs] == logprobs_V.argsort(descending=True)[:3].tolist()


def test_an_answer_so_far_that_the_grammar_does_not_allow_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="must allow token 2 of the answer"):
        answer(regex("ab"), TOKENIZER.encode("ac").ids)


def test_a_grammar_that_a_draft_broke_serves_the_answer_on() -> None:
    """And is compiled anew for the next one: copies share what they have learnt, and its limit."""
    text = ConstrainedText(grammar_of(regex("a(a|b)*")))
    text.take(TOKENIZER.encode("a").ids[0])
    allowed_V, may_end = text.allowed(())
    text._matcher.consume_token(EOS)
    assert text._matcher.is_error()
    text._allowed.clear()
    again_V, may_still = text.allowed(())
    assert (again_V.tolist(), may_still) == (allowed_V.tolist(), may_end)


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        (regex("(ab"), "unclosed group"),
        (regex("(?=a)b"), "look-around"),
        (regex("(){3}"), "allows no answer but an empty one"),
        (regex("a{1000}{1000}"), "too many expressions"),
        (regex("(a|b)*" * 5000), "too many expressions|takes more than"),
        (schema({"type": "strin"}), "Invalid type: strin"),
        (schema({"type": "array", "uniqueItems": True}), "Unimplemented keys"),
        (schema({"$ref": "#"}), "json_schema="),
        (schema({"$ref": "http://example.com/schema.json"}), "retriev"),
    ],
    ids=lambda each: each.text[:12] if isinstance(each, Constraint) else "",
)
async def test_what_cannot_be_served_is_refused_by_name_and_a_hostile_one_costs_a_child(
    tokenizer: Tokenizer, constraint: Constraint, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason) as refusal:
        await Grammars(tokenizer, VOCAB_SIZE).begin(constraint)
    assert refusal.value.field == constraint.kind
    assert refusal.value.limit


async def test_a_model_without_a_tokenizer_has_no_text_to_hold_to_anything() -> None:
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        await Grammars(None, VOCAB_SIZE).begin(ANY_JSON_OBJECT)
    assert await Grammars(None, VOCAB_SIZE).begin(None) is None


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", "[]"),
        ("json_schema", "{"),
        ("json_schema", "[" * 30_000),
        ("json_schema", ""),
        ("regex", "x" * (MAX_CONSTRAINT_CHARS + 1)),
        ("regex", "\ud800"),
    ],
)
def test_what_is_no_constraint_is_refused_before_it_is_sent(kind: Any, text: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        Constraint(kind=kind, text=text)
    assert refusal.value.field == kind
    with pytest.raises(InvalidRequest, match="must be json_schema or regex"):
        Constraint(kind="grammar", text="x")  # type: ignore[arg-type]


@pytest.fixture
def tokenizer(tiny_with_tokenizer: Checkpoint) -> Tokenizer:
    found = Tokenizer.load(tiny_with_tokenizer)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def tiny_with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tokenizer=True)


async def test_grammars_are_compiled_once_and_a_bounded_number_is_kept(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = list[str]()
    monkeypatch.setattr(grammar, "_tried_out", lambda each: compiled.append(each) or "")
    grammars = Grammars(tokenizer, VOCAB_SIZE)
    first, *others = [regex("a" * (number + 1)) for number in range(MAX_KEPT + 1)]
    await grammars.begin(first)
    await grammars.begin(first)
    assert len(compiled) == 1
    for each in others:
        await grammars.begin(each)
    assert len(grammars._kept) == MAX_KEPT
    await grammars.begin(first)
    assert len(compiled) == len(others) + 2
    grammars._kept[first].is_worn = True
    await grammars.begin(first)
    assert len(compiled) == len(others) + 3


@cache
def smollm2_grammars(checkpoint: Checkpoint) -> Grammars:
    return Grammars(Tokenizer.load(checkpoint), checkpoint.config.vocab_size)


@pytest.mark.parametrize(
    "constraint",
    [
        schema(
            {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}, "ok": {"type": "boolean"}}}
            | {"required": ["name", "ok"], "additionalProperties": False}
        ),
        regex("(Yes|No), because [a-z ]{3,20}\\."),
    ],
    ids=["schema", "regex"],
)
async def test_a_real_vocabulary_writes_what_is_asked_for(
    smollm2_checkpoint: Checkpoint, constraint: Constraint
) -> None:
    """Its 49,152 tokens cut across the grammar's; the logits are noise."""
    tokenizer = Tokenizer.load(smollm2_checkpoint)
    assert tokenizer is not None
    sequence = RunningAnswer(
        unread_token_ids=PROMPT,
        position=0,
        num_chains=2,
        max_new_tokens=80,
        table_M=TABLE_M,
        sampling=SamplingParams(temperature=1.0, seed=3),
        stop_token_ids=tokenizer.eos_token_ids,
        text_stream=tokenizer.stream(keeps_first_space=True),
        constrained=await smollm2_grammars(smollm2_checkpoint).begin(constraint),
    )
    tokens = list[Token]()
    while sequence.finish_reason is None:
        position = len(PROMPT) + sequence.num_new_tokens
        logits_V = np.random.default_rng(position).normal(size=smollm2_checkpoint.config.vocab_size) * 5
        tokens += sequence.advance(choose([sequence.sampler], [position], torch.from_numpy(logits_V)[None]))
    text = "".join(token.text for token in tokens) + sequence.tail
    assert sequence.finish_reason is FinishReason.STOP
    if constraint.kind == "regex":
        assert re.fullmatch(constraint.text, text)
    else:
        Draft202012Validator(json.loads(constraint.text)).validate(json.loads(text))
