"""Bias, penalties, min-p and the least length, held to their formulas; drafts and lost nodes change nothing of them.

Shapes: V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colm.errors import ColmError, InvalidRequest
from colm.events import FinishReason
from colm.sampling import MAX_LOGIT_BIASES, SamplingParams
from decode_node.penalties import Penalties
from decode_node.running_answer import RunningAnswer
from decode_node.sampler import Choice, Sampler, choose

VOCAB_SIZE = 12
EOS = 2
TABLE_M = np.zeros(3, dtype=np.int32)
IDS = st.integers(0, VOCAB_SIZE - 1)
LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=VOCAB_SIZE, max_size=VOCAB_SIZE)
PENALTIES = st.builds(
    SamplingParams,
    presence_penalty=st.sampled_from([0.0, -0.5, 2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -2.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.7]),
    logit_bias=st.dictionaries(IDS, st.sampled_from([-100.0, -0.5, 3.0]), max_size=3).map(
        lambda each: (*each.items(),)
    ),
)


def reference(
    params: SamplingParams, prompt: Sequence[int], answer: Sequence[int], logits: Sequence[float]
) -> list[float]:
    """vLLM's order, token by token: bias; repetition of prompt and answer; frequency and presence in the answer."""
    edited = list(logits)
    for token_id, bias in params.logit_bias:
        edited[token_id] += bias
    for token_id in range(len(edited)):
        if token_id in prompt or token_id in answer:
            factor = params.repetition_penalty
            edited[token_id] = edited[token_id] / factor if edited[token_id] > 0 else edited[token_id] * factor
        count = list(answer).count(token_id)
        edited[token_id] -= params.frequency_penalty * count
        edited[token_id] -= params.presence_penalty * (count > 0)
    return np.array(edited, dtype=np.float32).tolist()


def choice(sampler: Sampler, logits: Sequence[float], position: int = 0) -> Choice:
    (outcome,) = choose([sampler], [position], torch.tensor([logits]))
    assert not isinstance(outcome, ColmError)
    return outcome


@given(PENALTIES, st.lists(IDS, max_size=5), st.lists(IDS, max_size=6), st.lists(IDS, max_size=4), LOGITS)
def test_logits_are_edited_as_the_formulas_say_behind_any_text_and_any_drafts(
    params: SamplingParams, prompt: list[int], answer: list[int], drafts: list[int], logits: list[float]
) -> None:
    """Draft by draft: the row behind each sees those before it, and those that were refused leave nothing."""
    sampler = Sampler(params, first_position=7, prompt_token_ids=prompt, draft_token_ids=drafts)
    logits_V = np.array(logits, dtype=np.float32)
    for num_made, token_id in enumerate((*answer, None)):
        for num_drafts in range(len(drafts) + 1):
            edited_V = sampler.edited(7 + num_made + num_drafts, logits_V)
            text = [*answer[:num_made], *drafts[:num_drafts]]
            assert edited_V.tolist() == reference(params, prompt, text, logits_V.tolist())
        if token_id is not None:
            sampler.take(token_id)
    assert logits_V.tolist() == np.array(logits, dtype=np.float32).tolist()


@given(PENALTIES, LOGITS)
def test_greedy_takes_the_likeliest_of_the_edited_logits_and_reports_the_models_own(
    params: SamplingParams, logits: list[float]
) -> None:
    sampler = Sampler(params, prompt_token_ids=[3, 4])
    sampler.take(5)
    chosen = choice(sampler, logits, position=1)
    edited = reference(params, [3, 4], [5], np.array(logits, dtype=np.float32).tolist())
    assert edited[chosen.token_id] == max(edited)
    assert chosen.logprob == float(torch.tensor(logits).log_softmax(dim=0)[chosen.token_id])


def test_a_request_without_edits_costs_nothing() -> None:
    """Its logits are not even copied."""
    assert Penalties.of(SamplingParams(temperature=1.0, min_p=0.5, min_tokens=3), [1]) is None
    logits_V = np.zeros(VOCAB_SIZE, dtype=np.float32)
    sampler = Sampler(SamplingParams())
    assert sampler.edited(0, logits_V) is logits_V
    assert sampler.allowed(0, VOCAB_SIZE) is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_edits_never_make_logits_infinite(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, repetition_penalty=10.0, logit_bias=((1, 100.0),), seed=1)
    sampler = Sampler(params, prompt_token_ids=range(4))
    assert choice(sampler, [-3e38, -2e38, -3e38, -3e38]).token_id in range(4)


@given(LOGITS, st.sampled_from([0.0, 0.05, 0.3, 1.0]), st.sampled_from([0, 3]), st.sampled_from([1.0, 0.7]))
def test_min_p_keeps_what_reaches_its_part_of_the_likeliest_before_top_p(
    logits: list[float], min_p: float, top_k: int, top_p: float
) -> None:
    """In probabilities after temperature; what top_p then counts is renormalised."""
    params = SamplingParams(temperature=0.8, min_p=min_p, top_k=top_k, top_p=top_p, seed=1)
    probabilities = (torch.tensor(logits).double() / 0.8).softmax(dim=0).sort(descending=True).values
    kept = probabilities[: top_k or None]
    kept = kept[kept >= min_p * kept[0] * (1 - 1e-9)]
    kept = kept / kept.sum()
    kept = kept[kept.cumsum(dim=0) - kept < top_p + 1e-9]
    rarest = float(torch.tensor(logits).double().sort(descending=True).values[len(kept) - 1])
    drawn = {choice(Sampler(params), logits, position).token_id for position in range(20)}
    assert all(np.float32(logits[token_id]) >= rarest - 1e-9 for token_id in drawn)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_is_chosen_before_the_least_length_unless_there_is_nothing_else(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, min_tokens=3, seed=1)
    sampler = Sampler(params, first_position=10, end_token_ids={0, EOS, 4_000_000_000})
    logits = [9.0, 0.0, 9.0, 1.0]
    assert all(choice(sampler, logits, position).token_id in (1, 3) for position in (10, 11, 12))
    assert choice(sampler, logits, 13).token_id in (0, EOS)
    all_end = Sampler(params, first_position=10, end_token_ids=range(4))
    assert choice(all_end, logits, 10).token_id in (0, EOS)


def answer(sampling: SamplingParams, made_token_ids: Sequence[int] = (), **options: Any) -> RunningAnswer:
    return RunningAnswer(
        unread_token_ids=(5, 6),
        position=1,
        num_chains=2,
        max_new_tokens=20,
        table_M=TABLE_M,
        sampling=sampling,
        stop_token_ids={EOS},
        text_stream=None,
        prompt_token_ids=(4, 5, 6),
        made_token_ids_N=made_token_ids,
        **options,
    )


@given(PENALTIES, st.lists(IDS.filter(lambda token_id: token_id != EOS), min_size=1, max_size=6), LOGITS)
def test_a_node_that_takes_over_edits_as_the_lost_one_would_have(
    params: SamplingParams, made: list[int], logits: list[float]
) -> None:
    logits_V = np.array(logits, dtype=np.float32)
    undisturbed = answer(params)
    undisturbed.sampler.edited(3, logits_V)
    for token_id in made:
        undisturbed.advance([Choice(token_id, 0.0, ())])
    position = 3 + len(made)
    edited_V = answer(params, made).sampler.edited(position, logits_V)
    assert edited_V.tolist() == undisturbed.sampler.edited(position, logits_V).tolist()
    assert edited_V.tolist() == reference(params, (4, 5, 6), made, logits_V.tolist())


def test_an_end_counts_from_the_least_length_on() -> None:
    """Also of an answer that another node began."""
    params = SamplingParams(min_tokens=2)
    logits_V = np.eye(VOCAB_SIZE, dtype=np.float32)[EOS]
    for made in ((), (7,), (7, 8)):
        going_on = answer(params, made)
        chosen = choice(going_on.sampler, logits_V.tolist(), 3 + len(made))
        assert (chosen.token_id == EOS) == (len(made) == 2)
        going_on.advance([chosen])
        assert going_on.finish_reason is (FinishReason.STOP if len(made) == 2 else None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 10.5),
        ("min_p", 1.1),
        ("min_p", -0.1),
        ("logit_bias", ((1, 100.5),)),
        ("logit_bias", ((1, 1.0), (1, 2.0))),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((1,),)),
        ("logit_bias", {1: 1.0}),
        ("logit_bias", tuple((token_id, 0.0) for token_id in range(MAX_LOGIT_BIASES + 1))),
        ("min_tokens", -1),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParams(**{field: value})
    assert refusal.value.field == field
    assert refusal.value.limit


def test_the_limits_themselves_are_accepted() -> None:
    SamplingParams(
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=10,
        min_p=1,
        logit_bias=tuple((token_id, -100.0) for token_id in range(MAX_LOGIT_BIASES)),
        min_tokens=(1 << 32) - 1,
    )
