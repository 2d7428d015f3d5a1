"""How many chains a loaded node spends: it gives way to load in time, and to steady load comes a steady level."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from decode_node.auto_scale import CALM, REGAIN_S, SHED_S, SLOW, AutoScale, Load
from tests.clock import FakeClock

WEIGHTS = (10, 30, 60, 100)
FULL = len(WEIGHTS)


@dataclass
class Node:
    """A node whose steps take what its weights and rows do."""

    policy: AutoScale
    clock: FakeClock

    @classmethod
    def new(cls) -> "Node":
        return cls(AutoScale(WEIGHTS), FakeClock())

    def step(self, num_answers: int, *, num_waiting: int = 0, row_cost: float = 0.3, is_plain: bool = True) -> int:
        """Run a step at the policy's level; returns the level after it."""
        level = self.policy.level
        step_s = 3e-3 * WEIGHTS[level - 1] * (1 + row_cost * num_answers)
        self.clock.now_s += step_s
        self.policy.note(
            Load(
                now_s=self.clock.now(),
                num_waiting=num_waiting,
                num_answers=num_answers,
                num_chains=level,
                plain_s=step_s if is_plain else None,
            )
        )
        return self.policy.level

    def run(self, seconds: float, num_answers: int, **load: Any) -> list[int]:
        """Levels after each step of so much time."""
        end_s, levels = self.clock.now() + seconds, [self.policy.level]
        while self.clock.now() < end_s:
            levels.append(self.step(num_answers, **load))
        return levels


def test_a_few_answers_have_all_chains() -> None:
    node = Node.new()
    assert set(node.run(10, 1) + node.run(10, 2)) == {FULL}


def test_a_batch_that_slows_steps_down_gives_chains_away_and_gets_them_back() -> None:
    node = Node.new()
    node.run(2, 1)
    shed = node.run(20, 8)
    assert shed[0] == FULL
    assert shed[-1] < FULL
    assert shed == sorted(shed, reverse=True)
    regained = node.run(20, 1)
    assert regained[-1] == FULL
    assert regained == sorted(regained)


def test_who_waits_for_a_place_costs_a_chain_within_a_moment_and_never_the_first() -> None:
    node = Node.new()
    levels = node.run(3, 1, num_waiting=1)
    assert levels[-1] == 1
    assert all(after >= before - 1 for before, after in pairwise(levels))
    node = Node.new()
    node.run(SHED_S + 0.2, 1, num_waiting=1)
    assert node.policy.level == FULL - 1


def test_a_moments_load_costs_nothing() -> None:
    node = Node.new()
    node.run(2, 1)
    assert node.step(30) == FULL
    assert node.step(1, num_waiting=1) == FULL
    assert set(node.run(10, 1)) == {FULL}


def test_the_time_of_a_step_with_drafts_or_a_prompt_says_nothing() -> None:
    node = Node.new()
    node.run(2, 1)
    assert {node.step(30, is_plain=False) for _ in range(100)} == {FULL}


def test_a_node_that_rests_has_all_chains_again_at_once() -> None:
    node = Node.new()
    node.run(3, 1, num_waiting=1)
    node.policy.rest()
    assert node.policy.level == FULL
    assert node.step(1) == FULL


@settings(max_examples=40, deadline=None)
@given(
    num_answers=st.integers(1, 64),
    row_cost=st.floats(0.0, 2.0),
    before=st.lists(st.tuples(st.integers(1, 64), st.booleans()), max_size=30),
)
def test_a_steady_load_leads_to_a_steady_level(
    num_answers: int, row_cost: float, before: list[tuple[int, bool]]
) -> None:
    """Whatever was before, the level comes to rest: at 1, or where a step is not slow and the next one might be."""
    node = Node.new()
    for _ in range(5):
        node.step(1, row_cost=row_cost)
    for others, waits in before:
        for _ in range(10):
            node.step(others, num_waiting=int(waits), row_cost=row_cost)
    for seconds in (5 * REGAIN_S, 3 * REGAIN_S):  # the first to settle
        levels = {node.step(num_answers, row_cost=row_cost) for _ in range(20)}
        levels |= set(node.run(seconds, num_answers, row_cost=row_cost))
    (level,) = levels
    slowness = [weights / WEIGHTS[-1] * (1 + row_cost * num_answers) / (1 + row_cost) for weights in WEIGHTS]
    assert level == 1 or slowness[level - 1] <= SLOW * (1 + 1e-9)
    if level < FULL:
        assert slowness[level] > CALM * (1 - 1e-9)


class AutoScaleMachine(RuleBasedStateMachine):
    """Any loads, in any order."""

    @initialize()
    def create(self) -> None:
        self.policy, self.clock = AutoScale(WEIGHTS), FakeClock()
        self.changed_s = -1e9
        self.waited_s = -1e9

    @precondition(lambda self: hasattr(self, "policy"))
    @rule(
        pause_s=st.floats(1e-3, 3.0),
        num_waiting=st.integers(0, 2),
        num_answers=st.integers(1, 9),
        num_chains=st.integers(1, FULL),
        plain_s=st.none() | st.floats(1e-4, 1.0),
    )
    def note(self, pause_s: float, num_waiting: int, num_answers: int, num_chains: int, plain_s: float | None) -> None:
        self.clock.now_s += pause_s
        now_s, before = self.clock.now(), self.policy.level
        self.policy.note(
            Load(
                now_s=now_s,
                num_waiting=num_waiting,
                num_answers=num_answers,
                num_chains=num_chains,
                plain_s=plain_s,
            )
        )
        if num_waiting:
            self.waited_s = now_s
        if (moved := self.policy.level - before) != 0:
            assert abs(moved) == 1
            assert 1 <= self.policy.level <= FULL
            assert now_s - self.changed_s >= (SHED_S if moved < 0 else REGAIN_S)
            if moved > 0:
                assert now_s - self.waited_s >= REGAIN_S
            self.changed_s = now_s

    @rule()
    def rest(self) -> None:
        self.policy.rest()
        assert self.policy.level == FULL


TestAutoScale = AutoScaleMachine.TestCase
TestAutoScale.settings = settings(max_examples=40, deadline=None)
