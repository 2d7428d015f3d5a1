"""Which sampling parameters are allowed, and which tokens the sampler then chooses.

Shapes: R requests, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, currently_in_test_context, given
from hypothesis import strategies as st
from torch import Tensor

from colm.errors import ColmError, InvalidRequest, NotFinite
from colm.sampling import (
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TEMPERATURE,
    MAX_TOP_LOGPROBS,
    SamplingParams,
)
from decode_node.sampler import Choice, Sampler, _likeliest, _nucleus, choose

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


def choice(sampler: Sampler, logits_V: Tensor, position: int = 0) -> Choice:
    """The token of a request that is alone in its step."""
    (outcome,) = choose([sampler], [position], logits_V[None])
    if isinstance(outcome, ColmError):
        raise outcome
    return outcome


def draws(params: SamplingParams, logits_V: Tensor, count: int) -> list[int]:
    sampler = Sampler(params)
    return [choice(sampler, logits_V, position).token_id for position in range(count)]


def kept(params: SamplingParams, logits_V: Tensor) -> dict[int, float]:
    """Reference: every token that may be drawn with its probability, likeliest first, by one sort of everything."""
    ordered, ids = logits_V.double().sort(descending=True, stable=True)
    ordered, ids = ordered[: params.top_k or None], ids[: params.top_k or None]
    probabilities = ((ordered - ordered[0]) / params.temperature).softmax(dim=0)
    before = probabilities.cumsum(dim=0) - probabilities
    if params.top_p < 1:
        if currently_in_test_context():
            assume(float((before - params.top_p).abs().min()) > 1e-9)  # otherwise rounding decides
        probabilities = probabilities[before < params.top_p]
    probabilities = probabilities / probabilities.sum()
    return dict(zip(ids.tolist(), probabilities.tolist(), strict=False))


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
    token_id = choice(Sampler(SamplingParams()), logits_V).token_id
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
    likeliest = set(logits_V.topk(top_k).indices.tolist())
    assert set(draws(SamplingParams(temperature=1.0, top_k=top_k, seed=1), logits_V, 400)) == likeliest


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    params = SamplingParams(temperature=1.0, top_k=1000, seed=1)
    assert set(draws(params, torch.zeros(4), 100)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("top_p", "smallest"), [(0.49, {2}), (0.51, {2, 0}), (0.79, {2, 0}), (0.81, {2, 0, 3}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, smallest: set[int]) -> None:
    logits_V = torch.tensor([0.3, 0.05, 0.5, 0.15]).log()
    assert set(draws(SamplingParams(temperature=1.0, top_p=top_p, seed=1), logits_V, 300)) == smallest


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
    chosen = choice(Sampler(params), logits_V)
    logprobs_V = logits_V.float().log_softmax(dim=0)
    assert chosen.logprob == float(logprobs_V[chosen.token_id])
    assert all(logprob == float(logprobs_V[token_id]) for token_id, logprob in chosen.top_logprobs)


def test_top_logprobs_are_the_likeliest_in_order() -> None:
    logits_V = random_logits()
    chosen = choice(Sampler(SamplingParams(top_logprobs=6)), logits_V)
    assert [token_id for token_id, _ in chosen.top_logprobs] == logits_V.argsort(descending=True)[:6].tolist()


def test_top_logprobs_stop_at_the_vocabulary() -> None:
    assert len(choice(Sampler(SamplingParams(top_logprobs=9)), torch.zeros(3)).top_logprobs) == 3


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
    with pytest.raises(NotFinite, match="logits are not finite"):
        choice(Sampler(SamplingParams(temperature=temperature, seed=1)), logits())


# Whole numbers and bf16 have many equals.
TIED_LOGITS = st.lists(st.integers(-6, 6), min_size=1, max_size=300).map(lambda values: torch.tensor(values).float())
LOGITS = UNIT_LOGITS | TIED_LOGITS
CUTS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 100, 1000]),
    top_p=st.sampled_from([1e-12, 0.1, 0.5, 0.9, 0.99, 1.0]),
    seed=st.integers(0, 99),
)


@given(LOGITS, st.integers(0, 40))
def test_the_likeliest_are_those_of_a_stable_sort(logits_V: Tensor, count: int) -> None:
    ordered = logits_V.argsort(descending=True, stable=True)
    assert _likeliest(logits_V.numpy(), count).tolist() == ordered[:count].tolist()


@pytest.mark.parametrize("count", [1, 20, 63, 64, 65, 4096, 8191, 8192, 9000])
@pytest.mark.parametrize("vocab_size", [8192, 8191, 8193 + 127])
def test_the_likeliest_of_a_large_vocabulary_with_equals(vocab_size: int, count: int) -> None:
    logits_V = random_logits(vocab_size=vocab_size).bfloat16().float()
    ordered = logits_V.argsort(descending=True, stable=True)
    assert _likeliest(logits_V.numpy(), count).tolist() == ordered[:count].tolist()


@given(LOGITS, st.floats(1e-12, 1.0, exclude_max=True))
def test_the_nucleus_is_that_of_a_sort(logits_V: Tensor, top_p: float) -> None:
    expected = kept(SamplingParams(temperature=1.0, top_p=top_p), logits_V)
    weights = (logits_V - logits_V.max()).double().exp()
    assert set(_nucleus(logits_V.numpy(), weights.numpy(), top_p).tolist()) == set(expected)


@pytest.mark.parametrize("steepness", [0.0, 0.01, 0.5, 1.1, 1.5, 4.0, 40.0])
@pytest.mark.parametrize("top_p", [0.001, 0.5003, 0.95, 0.999])
def test_the_nucleus_of_a_large_vocabulary(steepness: float, top_p: float) -> None:
    """From equal probabilities to a single token with all of the probability."""
    shuffled = torch.randperm(50_021, generator=torch.Generator().manual_seed(1))
    logits_V = (-steepness * torch.arange(1.0, 50_022).log())[shuffled].bfloat16().float()
    expected = kept(SamplingParams(temperature=1.0, top_p=top_p), logits_V)
    weights = (logits_V - logits_V.max()).double().exp()
    assert set(_nucleus(logits_V.numpy(), weights.numpy(), top_p).tolist()) == set(expected)


@given(LOGITS, CUTS)
def test_what_is_drawn_may_be_drawn(logits_V: Tensor, params: SamplingParams) -> None:
    assert set(draws(params, logits_V, 5)) <= set(kept(params, logits_V))


@pytest.mark.parametrize(
    "cuts",
    [{}, {"top_k": 6}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.9}, {"temperature": 3.0, "top_p": 0.95}],
    ids=["plain", "top_k", "top_p", "both", "hot"],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(cuts: dict[str, Any]) -> None:
    """6,000 draws of one seed, within 5 standard deviations for each token."""
    params = SamplingParams(**{"temperature": 1.0, "seed": 5} | cuts)
    logits_V = random_logits(seed=3, vocab_size=40)
    counts = np.bincount(draws(params, logits_V, 6_000), minlength=40)
    expected = kept(params, logits_V)
    for token_id, count in enumerate(counts.tolist()):
        mean = 6_000 * expected.get(token_id, 0.0)
        assert abs(count - mean) <= 5 * mean**0.5


MIXED = (
    SamplingParams(seed=7),
    SamplingParams(seed=8, top_logprobs=3),
    SamplingParams(seed=9, top_logprobs=20),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, seed=2, top_k=1),
    SamplingParams(temperature=1.0, seed=3, top_k=50, top_logprobs=2),
    SamplingParams(temperature=1.5, seed=4, top_p=0.95),
    SamplingParams(temperature=1.0, seed=5, top_k=7, top_p=0.5),
    SamplingParams(temperature=2.0, seed=6, top_k=900),
)


def run(requests: Sequence[int], vocab_size: int, num_steps: int = 4) -> dict[int, list[Any]]:
    """Each request's outcomes over some steps taken together."""
    samplers = [Sampler(MIXED[request]) for request in requests]
    outcomes: list[list[Any]] = [[] for _ in requests]
    for step in range(num_steps):
        rows = [random_logits(100 * request + step, vocab_size) for request in requests]
        positions = [100 * request + step for request in requests]
        for outcome, chosen in zip(outcomes, choose(samplers, positions, torch.stack(rows).bfloat16()), strict=True):
            outcome.append(chosen)
    return dict(zip(requests, outcomes, strict=True))


@pytest.mark.parametrize("vocab_size", [1000, 4099, 49_152])
def test_neighbours_change_nothing_to_the_bit(vocab_size: int) -> None:
    alone: dict[int, Any] = {}
    for request in range(len(MIXED)):
        alone |= run([request], vocab_size)
    assert run(range(len(MIXED)), vocab_size) == alone
    for batch in ([8, 0, 3], [5, 2], [7, 6, 5, 4, 3, 2, 1]):
        assert run(batch, vocab_size) == {request: alone[request] for request in batch}


@given(st.permutations(range(len(MIXED))), st.integers(1, len(MIXED)))
def test_neighbours_change_nothing_whoever_they_are(order: list[int], count: int) -> None:
    together = run(order[:count], 300, num_steps=2)
    assert all(run([request], 300, num_steps=2)[request] == together[request] for request in order[:count])


PLACES = st.tuples(st.integers(0, len(MIXED) - 1), st.integers(0, 9))


@given(st.lists(st.lists(PLACES, min_size=1, max_size=12), min_size=1, max_size=4))
def test_a_token_is_the_same_in_any_step_and_however_often_it_is_chosen(steps: list[list[tuple[int, int]]]) -> None:
    """A position that is chosen again, as behind a draft that was refused, or not at all, changes no other."""
    samplers = [Sampler(params) for params in MIXED]
    for places in steps:
        logits_QV = torch.stack([random_logits(seed=100 * request + position) for request, position in places])
        outcomes = choose([samplers[request] for request, _ in places], [position for _, position in places], logits_QV)
        for (request, position), outcome in zip(places, outcomes, strict=True):
            alone = choice(Sampler(MIXED[request]), random_logits(seed=100 * request + position), position)
            assert outcome == alone


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_fails_alone(value: float) -> None:
    logits_RV = torch.stack([random_logits(row) for row in range(3)])
    params = SamplingParams(temperature=1.0, seed=1, top_k=5, top_logprobs=2)
    healthy = [choice(Sampler(params), logits_V) for logits_V in logits_RV]
    logits_RV[1, 7] = value
    first, failed, last = choose([Sampler(params) for _ in range(3)], [0] * 3, logits_RV)
    assert (first, last) == (healthy[0], healthy[2])
    assert isinstance(failed, ColmError)


@pytest.mark.parametrize("params", [{"top_k": 2}, {"top_p": 0.39}], ids=["top_k", "top_p"])
def test_of_equals_the_lower_ids_are_kept(params: dict[str, Any]) -> None:
    logits_V = torch.tensor([0.0, 3.0, 3.0, 3.0, 3.0, 3.0])
    assert set(draws(SamplingParams(temperature=1.0, seed=1, **params), logits_V, 100)) == {1, 2}


def test_random_numbers_are_those_of_seed_and_position_and_spread_evenly() -> None:
    """Fixed for good: an answer may go on elsewhere, and under another version of its libraries."""
    seed7 = Sampler(SamplingParams(temperature=1.0, seed=7))
    numbers = [seed7.uniform(position) for position in range(4000)]
    assert numbers[:2] == [seed7.uniform(0), seed7.uniform(1)] == [0.5176721758301505, 0.12602702988134762]
    assert all(0 < number <= 1 for number in numbers)
    counts = np.bincount((np.array(numbers) * 10).astype(int), minlength=10)[:10]
    assert abs(counts - 400).max() <= 5 * 400**0.5
    others = [Sampler(SamplingParams(temperature=1.0, seed=8)).uniform(position) for position in range(4000)]
    assert abs(np.corrcoef(numbers, others)[0, 1]) < 0.1
