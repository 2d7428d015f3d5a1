"""What may be asked of the sampler, and what it then chooses.

Shapes: V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from colm.errors import ColmError, InvalidRequest
from colm.sampling import (
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TEMPERATURE,
    MAX_TOP_LOGPROBS,
    SamplingParams,
)
from decode_node.sampler import Sampler

BAD_VALUES: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", MAX_TEMPERATURE + 0.1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_p", float("nan")),
    ("top_k", -1),
    ("top_k", 1 << 32),
    ("seed", -1),
    ("seed", 1 << 64),
    ("stop", ("",)),
    ("stop", ("x" * (MAX_STOP_CHARS + 1),)),
    ("stop", ("x",) * (MAX_STOP_STRINGS + 1)),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", (1 << 32,)),
    ("stop_token_ids", (1,) * (MAX_STOP_TOKEN_IDS + 1)),
    ("top_logprobs", -1),
    ("top_logprobs", MAX_TOP_LOGPROBS + 1),
    ("temperature", "1"),
    ("temperature", True),
    ("temperature", 10**400),
    ("top_p", None),
    ("top_k", 1.0),
    ("top_k", True),
    ("seed", 1.5),
    ("stop", "abc"),
    ("stop", 5),
    ("stop", (5,)),
    ("stop", ("ab\ud800",)),
    ("stop_token_ids", (1.0,)),
    ("stop_token_ids", (True,)),
    ("stop_token_ids", {1}),
    ("top_logprobs", 2.0),
    ("ignore_eos", 1),
]

LIMITS: list[tuple[str, Any]] = [
    ("temperature", MAX_TEMPERATURE),
    ("top_p", 1e-9),
    ("top_k", (1 << 32) - 1),
    ("seed", (1 << 64) - 1),
    ("stop", ("x" * MAX_STOP_CHARS,) * MAX_STOP_STRINGS),
    ("stop_token_ids", ((1 << 32) - 1,) * MAX_STOP_TOKEN_IDS),
    ("top_logprobs", MAX_TOP_LOGPROBS),
]

UNIT_LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=24).map(torch.tensor)


def random_logits(seed: int = 0, vocab_size: int = 50) -> Tensor:
    return 2 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed))


def draws(params: SamplingParams, logits_V: Tensor, count: int) -> list[int]:
    sampler = Sampler(params)
    return [sampler.choose(logits_V).token_id for _ in range(count)]


@pytest.mark.parametrize(("field", "value"), BAD_VALUES)
def test_a_value_out_of_range_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParams(**{field: value})
    assert refusal.value.field == field
    assert refusal.value.limit


@pytest.mark.parametrize(("field", "value"), LIMITS)
def test_the_limit_itself_is_accepted(field: str, value: Any) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value


@given(UNIT_LOGITS)
def test_greedy_takes_the_likeliest(logits_V: Tensor) -> None:
    token_id = Sampler(SamplingParams()).choose(logits_V).token_id
    assert logits_V[token_id] == logits_V.max()


def test_greedy_reads_no_seed() -> None:
    assert draws(SamplingParams(seed=1), random_logits(), 3) == draws(SamplingParams(seed=2), random_logits(), 3)


def test_the_same_seed_gives_the_same_tokens() -> None:
    params = SamplingParams(temperature=1.0, seed=7)
    assert draws(params, random_logits(), 50) == draws(params, random_logits(), 50)


def test_another_seed_gives_other_tokens() -> None:
    first, second = (draws(SamplingParams(temperature=1.0, seed=seed), random_logits(), 50) for seed in (7, 8))
    assert first != second


def test_no_seed_draws_anew() -> None:
    params = SamplingParams(temperature=1.0)
    assert draws(params, random_logits(), 50) != draws(params, random_logits(), 50)


def test_every_64_bit_seed_is_usable() -> None:
    assert len(draws(SamplingParams(temperature=1.0, seed=(1 << 64) - 1), random_logits(), 2)) == 2


@pytest.mark.parametrize("top_k", [1, 2, 7])
def test_top_k_draws_all_of_the_k_likeliest_and_no_other(top_k: int) -> None:
    logits_V = random_logits(vocab_size=20) / 4
    kept = set(logits_V.topk(top_k).indices.tolist())
    assert set(draws(SamplingParams(temperature=1.0, top_k=top_k, seed=1), logits_V, 400)) == kept


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    params = SamplingParams(temperature=1.0, top_k=1000, seed=1)
    assert set(draws(params, torch.zeros(4), 100)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.49, {2}), (0.51, {2, 0}), (0.79, {2, 0}), (0.81, {2, 0, 3}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    logits_V = torch.tensor([0.3, 0.05, 0.5, 0.15]).log()
    assert set(draws(SamplingParams(temperature=1.0, top_p=top_p, seed=1), logits_V, 300)) == kept


@given(UNIT_LOGITS, st.floats(1e-6, 1.0, exclude_max=True))
def test_top_p_never_leaves_the_smallest_set(logits_V: Tensor, top_p: float) -> None:
    probabilities = logits_V.double().softmax(dim=0)
    for token_id in draws(SamplingParams(temperature=1.0, top_p=top_p, seed=1), logits_V, 10):
        likelier = probabilities[probabilities > 1.0001 * probabilities[token_id]].sum()
        assert likelier < top_p + 1e-5


@given(UNIT_LOGITS)
def test_top_p_always_keeps_one_token(logits_V: Tensor) -> None:
    (token_id,) = draws(SamplingParams(temperature=1.0, top_p=1e-12, seed=1), logits_V, 1)
    assert logits_V[token_id] == pytest.approx(float(logits_V.max()), abs=1e-5)


def test_top_p_is_measured_after_temperature_and_top_k() -> None:
    """Probabilities 0.4 0.3 0.2 0.1: of the first three, renormalised, two hold 0.78."""
    logits_V = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    params = SamplingParams(temperature=1.0, top_k=3, top_p=0.77, seed=1)
    assert set(draws(params, logits_V, 300)) == {0, 1}


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    """Bug: temperatures below float32's smallest divided by zero."""
    logits_V = random_logits()
    drawn = draws(SamplingParams(temperature=temperature, seed=1), logits_V, 20)
    assert set(drawn) == {int(logits_V.argmax())}


def test_temperature_divides_the_logits() -> None:
    logits_V = torch.tensor([2.0, 0.0])
    hot = draws(SamplingParams(temperature=4.0, seed=1), logits_V, 4000)
    share = hot.count(1) / len(hot)
    assert share == pytest.approx(float((logits_V / 4).softmax(dim=0)[1]), abs=0.03)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_logprobs_are_the_models_before_temperature_and_cuts(temperature: float) -> None:
    logits_V = random_logits().bfloat16()
    params = SamplingParams(temperature=temperature, top_k=5, top_p=0.9, seed=3, top_logprobs=4)
    choice = Sampler(params).choose(logits_V)
    logprobs_V = logits_V.float().log_softmax(dim=0)
    assert choice.logprob == float(logprobs_V[choice.token_id])
    assert all(logprob == float(logprobs_V[token_id]) for token_id, logprob in choice.top_logprobs)


def test_top_logprobs_are_the_likeliest_in_order() -> None:
    logits_V = random_logits()
    choice = Sampler(SamplingParams(top_logprobs=6)).choose(logits_V)
    assert [token_id for token_id, _ in choice.top_logprobs] == logits_V.argsort(descending=True)[:6].tolist()


def test_top_logprobs_stop_at_the_vocabulary() -> None:
    assert len(Sampler(SamplingParams(top_logprobs=9)).choose(torch.zeros(3)).top_logprobs) == 3


def test_a_token_that_is_ruled_out_is_never_drawn() -> None:
    logits_V = torch.tensor([0.0, float("-inf"), 0.0])
    assert set(draws(SamplingParams(temperature=10.0, seed=1), logits_V, 200)) == {0, 2}


def with_value(value: float) -> Callable[[], Tensor]:
    return lambda: torch.tensor([0.0, value, 1.0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "logits",
    [with_value(float("nan")), with_value(float("inf")), lambda: torch.full((3,), float("-inf"))],
    ids=["nan", "inf", "all -inf"],
)
def test_logits_that_are_not_finite_are_refused(logits: Callable[[], Tensor], temperature: float) -> None:
    """Bug: with a temperature, torch's own RuntimeError came out, which nobody can act on."""
    with pytest.raises(ColmError, match="logits are not finite"):
        Sampler(SamplingParams(temperature=temperature, seed=1)).choose(logits())
