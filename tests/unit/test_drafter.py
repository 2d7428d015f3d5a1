"""How many tokens an answer drafts: by what steps take, and by what was accepted."""

from collections.abc import Callable
from itertools import accumulate

import numpy as np
import pytest
from colm_kernels.decode_attention import MAX_QUERY_TOKENS
from hypothesis import given
from hypothesis import strategies as st

from decode_node.drafter import _FIRST_ACCEPTANCE, _NUM_KEPT, _STALE_STEPS, Drafter, Drafting, StepTimes
from decode_node.plan import MAX_DRAFT_TOKENS, PlanRow, StepPlan
from decode_node.step_budget import FastestSteps, StepBudget

TABLE_M = np.zeros(1, dtype=np.int32)
Cost = Callable[[int, int], float]
"""Seconds of a step of a scale and a number of tokens."""


def plan(num_chains: int, num_tokens: int, *, num_answers: int = 1, position: int = 1000) -> StepPlan:
    each = num_tokens // num_answers
    is_draft = num_chains == 1
    row = PlanRow((5,) * each, position // num_answers, num_chains, TABLE_M, num_logits=each, is_draft=is_draft)
    return StepPlan((row,) * num_answers)


def memory_bound(share: float, a_token: float = 0.0) -> Cost:
    """All weights take a second to read, chain 1's a share of it, and each token something on top."""
    return lambda scale, num_tokens: (share if scale == 1 else 1.0) + a_token * num_tokens


def run(drafter: Drafter, times: StepTimes, cost: Cost, acceptance: float, num_tokens: int) -> tuple[float, list[int]]:
    """Seconds for so many tokens of one answer, and the drafts of each round; drafts are accepted at an even rate."""
    seconds, made, rounds, credit = 0.0, 0, list[int](), 0.0
    while made < num_tokens:
        k = drafter.num_drafts(1)
        for scale, size in [(1, 1)] * k + [(4, k + 1)]:
            times.note(plan(scale, size), cost(scale, size))
            seconds += cost(scale, size)
        num_accepted = 0
        while num_accepted < k and (credit := credit + acceptance) >= 1:
            credit -= 1
            num_accepted += 1
        if k:
            drafter.note(num_accepted, was_refused=num_accepted < k)
        made += 1 + num_accepted
        rounds.append(k)
    return seconds, rounds


def new(max_draft_tokens: int = 8, share: float = 0.1) -> tuple[StepTimes, Drafter]:
    times = StepTimes([round(100 * share), 0, 0, 100], max_tokens=64)
    drafter = Drafting(times, max_draft_tokens).drafter()
    assert drafter is not None
    return times, drafter


def at_start(seconds: dict[int, float], draft_s: float) -> FastestSteps:
    return FastestSteps(seconds=seconds, max_tokens=64, draft_s=draft_s)


def test_a_verification_is_a_row_that_attention_takes() -> None:
    assert MAX_DRAFT_TOKENS + 1 == MAX_QUERY_TOKENS


def test_before_a_step_was_seen_nothing_is_drafted() -> None:
    _, drafter = new()
    assert drafter.num_drafts(1) == 0


@pytest.mark.parametrize(("draft_s", "expected"), [(0.05, 3), (0.95, 0)])
def test_the_first_decision_goes_by_what_the_node_measured_as_it_started(draft_s: float, expected: int) -> None:
    """It drafted as many as it may, as if any number of rows took as long as one, until it had seen them."""
    times = StepTimes([1, 4], max_tokens=64, at_start=at_start({1: 1.0, 4: 1.3, 5: 3.0}, draft_s))
    assert times.rounds(1)[:6] == pytest.approx([k * draft_s + s for k, s in enumerate((1, 1.1, 1.2, 1.3, 3, 3))])
    drafter = Drafting(times, 8).drafter()
    assert drafter is not None
    assert drafter.num_drafts(1) == expected


def test_what_was_measured_at_the_start_counts_in_proportion_to_what_steps_take_now() -> None:
    times = StepTimes([1, 4], max_tokens=64, at_start=at_start({1: 1.0, 4: 1.5, 8: 4.0}, 0.25))
    times.note(plan(2, 1), 2.0)
    expected = [2.0, 3.0, 2 * (1.5 + 2.5 / 4), 8.0]
    assert [times.rounds(1)[k] for k in (0, 3, 4, 7)] == pytest.approx(
        [0.5 * k + s for k, s in zip((0, 3, 4, 7), expected, strict=True)]
    )
    times.note(plan(1, 1), 0.1)
    times.note(plan(2, 4), 2.5)
    assert [times.rounds(1)[k] for k in (0, 3)] == pytest.approx([2.0, 0.3 + 2.5]), "what was seen stands for itself"


def test_answers_of_fewer_chains_take_their_part_of_what_was_measured_of_all() -> None:
    times = StepTimes([1, 2, 4], max_tokens=64, at_start=at_start({1: 1.0, 4: 1.5}, 0.25))
    times.note(plan(2, 1), 0.6)
    assert times.rounds(1)[3] == pytest.approx(3 * 0.6 * 0.5 + 0.9)
    times.note(plan(2, 1, position=9000), 1.2)
    for _ in range(_STALE_STEPS + 1):
        times.note(plan(1, 1), 0.2)
    assert times.rounds(1)[:4:3] == pytest.approx([0.5, 3 * 0.2 + 0.75]), "nothing of this scale is known any more"


def test_what_was_measured_at_the_start_counts_as_long_as_what_was_seen_often() -> None:
    times = StepTimes([1, 4], max_tokens=64, at_start=at_start({1: 1.0, 8: 9.0}, 0.1))
    for number in range(_STALE_STEPS * _NUM_KEPT + 1):
        assert times.rounds(1)[7] > 9, number
        times.note(plan(2, 1), 1.0)
    assert times.rounds(1)[7] < 3


def test_until_chain_1_was_seen_alone_its_steps_are_taken_by_its_weights() -> None:
    times, _ = new(share=0.25)
    times.note(plan(4, 1), 2.0)
    assert times.rounds(1) == pytest.approx([2.0 + 0.5 * k for k in range(16)])
    times.note(plan(1, 1), 0.1)
    assert times.rounds(1) == pytest.approx([2.0 + 0.1 * k for k in range(16)])


def test_weights_that_draft_may_be_a_part_of_chain_1s_bytes_and_answers_of_chain_1_are_no_drafts() -> None:
    times = StepTimes([1, 4], max_tokens=64, draft_share=0.5)
    times.note(plan(2, 1), 2.0)
    assert times.rounds(1)[1] == pytest.approx(2.0 + 0.25)
    times.note(StepPlan((PlanRow((5,), 1000, 1, TABLE_M),)), 1.9)
    assert times.rounds(1)[1] == pytest.approx(2.0 + 0.25)


def test_between_two_sizes_a_step_takes_what_lies_between_and_beyond_them_what_the_last_takes() -> None:
    times, _ = new()
    for scale, size, seconds in [(4, 1, 1.0), (4, 5, 3.0), (1, 1, 0.0)]:
        times.note(plan(scale, size), seconds)
    assert times.rounds(1)[:7] == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0, 3.0, 3.0])


def test_one_step_that_took_long_does_not_count() -> None:
    times, _ = new()
    for seconds in (1.0, 1.1, 99.0, 1.0, 1.2, 1.1):
        times.note(plan(4, 1), seconds)
    assert times.rounds(1)[0] == pytest.approx(1.1)


def test_steps_with_prompts_are_others() -> None:
    times, _ = new()
    row = PlanRow((5,), 9, 4, TABLE_M)
    times.note(StepPlan((row, PlanRow((5,) * 9, 0, 1, TABLE_M, num_logits=0))), 1.0)
    assert times.rounds(1) == [1.0], "no more than what is drawn from nothing"
    times.note(StepPlan((row,)), 3.0)
    assert times.rounds(1)[0] == 3.0


def test_what_is_old_or_of_another_context_is_forgotten() -> None:
    for make_old in (
        lambda times: [times.note(plan(4, 1), 1.0) for _ in range(_STALE_STEPS + 1)],
        lambda times: times.note(plan(4, 1, position=3000), 1.0),
    ):
        times, _ = new(share=0.1)
        times.note(plan(4, 1), 1.0)
        times.note(plan(1, 1), 0.9)
        assert times.rounds(1)[1] == pytest.approx(1.9)
        make_old(times)
        assert times.rounds(1)[1] == pytest.approx(1.1)


def test_no_verification_is_larger_than_what_has_bits_of_its_own() -> None:
    times, _ = new()
    for num_answers, longest in ((1, 15), (4, 15), (5, 11), (32, 1), (33, 0), (99, 0)):
        times.note(plan(4, num_answers, num_answers=num_answers), 1.0)
        times.note(plan(1, num_answers, num_answers=num_answers), 0.01)
        assert len(times.rounds(num_answers)) == longest + 1


def test_where_all_is_accepted_and_rows_are_free_it_drafts_as_many_as_it_may() -> None:
    times, drafter = new(max_draft_tokens=8)
    seconds, rounds = run(drafter, times, memory_bound(0.1), 1.0, 200)
    assert rounds.count(8) >= len(rounds) - 4
    assert 200 / seconds > 4


def test_where_nothing_is_accepted_it_soon_drafts_nothing_and_tries_again_now_and_then() -> None:
    times, drafter = new()
    seconds, rounds = run(drafter, times, memory_bound(0.3, 0.02), 0.0, 2000)
    assert 2000 / seconds > 0.97 / memory_bound(0.3, 0.02)(4, 1)
    assert rounds[200:].count(0) < len(rounds[200:])


def test_acceptance_and_cost_set_the_length() -> None:
    """Chain 1 is a third of the weights: with 0.7 accepted, 2 drafts are best, 1.31x; with 0.95 more are."""
    for acceptance, expected in ((0.7, {1, 2, 3}), (0.95, {5, 6, 7, 8})):
        times, drafter = new()
        seconds, rounds = run(drafter, times, memory_bound(1 / 3), acceptance, 1000)
        assert {k for k in rounds[-50:] if k} <= expected
        assert 1000 / seconds > 1.2


def test_rows_that_cost_as_much_as_reading_are_not_drafted() -> None:
    """A batch that fills the machine: a verification takes as long as its tokens one after the other."""
    times, drafter = new()
    _, rounds = run(drafter, times, lambda scale, size: 0.1 if scale == 1 else float(size), 1.0, 300)
    assert rounds.count(0) > 250


def test_what_earlier_answers_saw_is_expected_of_the_next_and_fades() -> None:
    times = StepTimes([1, 10], max_tokens=64)
    drafting = Drafting(times, 8)
    first = drafting.drafter()
    assert first is not None
    assert first.acceptance.share == pytest.approx(_FIRST_ACCEPTANCE)
    for _ in range(100):
        first.note(0, was_refused=True)
    shares = [drafter.acceptance.share for _ in range(60) if (drafter := drafting.drafter()) is not None]
    assert shares[0] < 0.1
    assert shares == sorted(shares)
    assert shares[-1] > 0.9


def test_a_request_that_wants_none_gets_no_drafter() -> None:
    drafting = Drafting(StepTimes([1, 10], max_tokens=64), 8)
    assert drafting.drafter(0) is None
    for asked, limit in ((None, 8), (3, 3), (20, 8)):
        drafter = drafting.drafter(asked)
        assert drafter is not None
        assert drafter._max_draft_tokens == limit


@given(st.floats(0.05, 0.9), st.floats(0, 0.3), st.lists(st.floats(0, 1), min_size=2, max_size=4), st.integers(1, 8))
def test_the_shortest_wish_makes_nobody_slower_where_rows_cost_evenly(
    share: float, a_token: float, acceptances: list[float], num_answers: int
) -> None:
    cost, times = memory_bound(share, a_token), StepTimes([1, 1, 1, 1], max_tokens=64)
    for size in range(1, 64 // num_answers + 1):
        for scale in (1, 4):
            num_tokens = size * num_answers
            times.note(plan(scale, num_tokens, num_answers=num_answers), cost(scale, num_tokens))
    drafting, wishes = Drafting(times, 8), []
    for acceptance in acceptances:
        drafter = drafting.drafter()
        assert drafter is not None
        drafter.acceptance.num_judged, drafter.acceptance.num_accepted = 100, 100 * acceptance
        wishes.append(drafter.num_drafts(num_answers))
    k = min(wishes)
    seconds = times.rounds(num_answers)
    for acceptance in acceptances:
        tokens = list(accumulate(acceptance**i for i in range(k + 1)))[-1]
        assert tokens / seconds[k] >= 0.999 / seconds[0]


def test_verifications_stay_within_the_budget_of_a_step() -> None:
    times = StepTimes((1, 2), max_tokens=64, budget=StepBudget(step_tokens=6, max_tokens=64))
    times.note(StepPlan(tuple(PlanRow((5,), 9, 2, TABLE_M) for _ in range(2))), 1.0)
    # Eight tokens beside two answers: four of each, three of them drafts.
    assert len(times.rounds(2)) == 1 + 3
