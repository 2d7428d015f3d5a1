"""How many tokens ride on one reading of the weights, as a node measures it, and what a step may read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_node.step_budget import FEW_TOKENS, RIDE, TILE_TOKENS, StepBudget, measure
from tests.clock import FakeClock


class Steps:
    """Steps that read weights, and take longer than that from some number of tokens on."""

    def __init__(self, weights_s: float, token_s: float, disturbed: dict[int, float] | None = None) -> None:
        self.clock = FakeClock()
        self.sizes: list[int] = []
        self._weights_s, self._token_s = weights_s, token_s
        self._disturbed = disturbed or {}
        """Number of the step, from 0, and how much longer it takes."""

    def __call__(self, num_tokens: int) -> None:
        extra_s = self._disturbed.get(len(self.sizes), 0.0)
        self.sizes.append(num_tokens)
        self.clock.now_s += self._weights_s + self._token_s * (num_tokens - 1) + extra_s


@given(weights_s=st.floats(1e-3, 1.0), ratio=st.floats(0.0, 1.0), max_tokens=st.integers(1, 64))
def test_as_many_tokens_ride_as_take_no_longer_than_the_weights(
    weights_s: float, ratio: float, max_tokens: int
) -> None:
    steps = Steps(weights_s, ratio * weights_s)
    found = measure(steps, steps.clock, max_tokens=max_tokens).num_riding
    sizes = [1, *range(TILE_TOKENS, max_tokens + 1, TILE_TOKENS)]
    riding = min(1 + (RIDE - 1) / ratio if ratio else 1e9, sizes[-1])
    assert abs(found - max(2, min(TILE_TOKENS, max_tokens), riding)) <= 1
    assert found <= max(2, max_tokens)


def test_a_step_that_something_disturbs_is_measured_again_and_the_fastest_counts() -> None:
    plain = Steps(0.010, 0.0005)
    expected = measure(plain, plain.clock, max_tokens=64).num_riding
    assert expected == 21
    disturbed = Steps(0.010, 0.0005, {0: 3.0, 1: 0.05, 3: 0.02} | dict.fromkeys(range(14, 99), 0.03))
    assert measure(disturbed, disturbed.clock, max_tokens=64).num_riding == expected


def test_a_start_waits_less_than_a_second_for_a_small_model_and_two_rounds_for_a_large_one() -> None:
    small, large = Steps(0.012, 0.0005), Steps(1.0, 0.05)
    for steps in (small, large):
        measure(steps, steps.clock, max_tokens=64)
    assert small.clock.now() - FakeClock().now() < 0.8
    assert large.sizes.count(1) == 1 + 2


def test_where_answers_may_draft_a_draft_and_steps_of_a_few_tokens_are_measured_too_for_the_same_budget() -> None:
    plain, steps, num_drafts = Steps(0.100, 0.002), Steps(0.100, 0.002), 0

    def draft() -> None:
        nonlocal num_drafts
        steps.clock.now_s += 0.020 if num_drafts == 2 else 0.050
        num_drafts += 1

    without = measure(plain, plain.clock, max_tokens=64)
    found = measure(steps, steps.clock, max_tokens=64, draft=draft)
    assert num_drafts == 1 + 2
    assert (without.draft_s, found.draft_s) == (None, pytest.approx(0.020))
    assert found.seconds.keys() - without.seconds.keys() == {*FEW_TOKENS}
    assert found.seconds == pytest.approx({num: 0.100 + 0.002 * (num - 1) for num in found.seconds})
    assert found.num_riding == without.num_riding == 51
    short = Steps(0.100, 0.002)
    assert list(measure(short, short.clock, max_tokens=5, draft=draft).seconds) == [1, 4]


@given(step_tokens=st.integers(2, 64), max_tokens=st.integers(1, 64), num_going=st.integers(1, 64))
def test_a_step_has_room_for_each_answer_and_somebody_beside(step_tokens: int, max_tokens: int, num_going: int) -> None:
    budget = StepBudget(step_tokens=step_tokens, max_tokens=max_tokens)
    with pytest.raises(ValueError, match="step_tokens=1 must be at least 2"):
        StepBudget(step_tokens=1, max_tokens=64)
    assert budget.tokens(0) == max(step_tokens, max_tokens)
    assert budget.tokens(1) == step_tokens
    assert budget.tokens(num_going) > num_going


@given(step_tokens=st.integers(2, 64), num_going=st.integers(1, 64))
def test_prompts_and_drafts_at_most_double_a_step(step_tokens: int, num_going: int) -> None:
    """Where a step of the budget takes twice as long as one of a single token."""
    weights_s = 0.010
    token_s = weights_s / (step_tokens - 1)
    num_tokens = StepBudget(step_tokens=step_tokens, max_tokens=64).tokens(num_going)
    answers_s, all_s = (weights_s + token_s * (count - 1) for count in (num_going, num_tokens))
    assert all_s == pytest.approx(RIDE * answers_s)
