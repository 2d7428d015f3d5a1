"""Who takes part in which step: nobody overtakes, nobody is out while a step holds it, nobody stays for ever."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from decode_node.plan import MAX_PROMPT_TOKENS, PlanRow, StepPlan
from decode_node.scheduler import Scheduler, Step

TABLE_M = np.zeros(4, dtype=np.int32)


@dataclass(eq=False)
class Reader:
    """An answer that reads rows of any length at any scale, and before its next token a prompt."""

    number: int
    num_chains: int = 1
    num_tokens: int = 1
    num_prompt_tokens: int = 0
    table_M: NDArray[np.int32] = field(default_factory=TABLE_M.copy)
    position: int = 0
    num_drafts: int = 0
    """How many more tokens it wants to draft."""
    num_logits: int = 1
    num_left: int = 9

    def draft_row(self, num_answers: int) -> PlanRow | None:
        assert num_answers >= 1
        return PlanRow((self.number,), self.position, 1, self.table_M) if self.num_drafts else None

    def next_rows(self) -> list[PlanRow]:
        tokens = (self.number,) * self.num_tokens
        row = PlanRow(tokens, self.position, self.num_chains, self.table_M, self.num_logits)
        prompt = (self.number,) * self.num_prompt_tokens
        return [
            row,
            *(PlanRow(piece, 0, 1, self.table_M, num_logits=0) for piece in (prompt[:16], prompt[16:]) if piece),
        ]


class SchedulerMachine(RuleBasedStateMachine):
    """Against a model that is three lists."""

    @initialize(max_batch_size=st.integers(1, 4))
    def create(self, max_batch_size: int) -> None:
        self.max_batch_size = max_batch_size
        self.scheduler: Scheduler[Reader] = Scheduler(max_batch_size=max_batch_size)
        self.waiting: list[Reader] = []
        self.active: list[Reader] = []
        self.leaving: list[Reader] = []
        self.gone: list[Reader] = []
        self.step: Step[Reader] | None = None
        self.num_joined = 0

    @rule(
        num_chains=st.integers(1, 3),
        num_tokens=st.integers(1, 16),
        num_prompt_tokens=st.just(0) | st.integers(1, MAX_PROMPT_TOKENS),
        num_drafts=st.integers(0, 3),
    )
    def join(self, num_chains: int, num_tokens: int, num_prompt_tokens: int, num_drafts: int) -> None:
        reader = Reader(self.num_joined, num_chains, num_tokens, num_prompt_tokens, num_drafts=num_drafts)
        self.num_joined += 1
        self.scheduler.join(reader)
        self.waiting.append(reader)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        everybody = [*self.waiting, *self.active, *self.leaving, *self.gone]
        if not everybody:
            return
        reader = data.draw(st.sampled_from(everybody))
        in_step = self.step is not None and reader in self.step.answers
        here = reader in self.waiting or reader in self.active
        assert self.scheduler.leave(reader) == (here and not in_step)
        if here:
            (self.waiting if reader in self.waiting else self.active).remove(reader)
            (self.leaving if in_step else self.gone).append(reader)

    @precondition(lambda self: self.step is None)
    @rule()
    def begin_step(self) -> None:
        while self.waiting and len(self.active) < self.max_batch_size:
            self.active.append(self.waiting.pop(0))
        self.step = self.scheduler.begin_step()
        if self.step is None:
            assert not self.active
            return
        steps, prompt_tokens = [], 0
        for reader in self.active:
            if reader.num_chains > 1 and all(other.num_drafts for other in self.active if other.num_chains > 1):
                steps.append(reader)  # a draft reads no prompt
            elif not prompt_tokens or prompt_tokens + reader.num_prompt_tokens <= MAX_PROMPT_TOKENS:
                prompt_tokens += reader.num_prompt_tokens
                steps.append(reader)
            else:
                assert reader.num_prompt_tokens
        large = [reader for reader in self.active if reader.num_chains > 1]
        drafting = large if all(reader.num_drafts for reader in large) else []
        assert self.step.drafting == set(drafting)
        # Larger scales first, and of equals whoever came first: neighbours keep their rows from step to step.
        expected = sorted(
            (
                (reader, row)
                for reader in steps
                for row in ([reader.draft_row(1)] if reader in drafting else reader.next_rows())
                if row is not None
            ),
            key=lambda pair: -pair[1].num_chains,
        )
        assert list(self.step.answers) == [reader for reader, _ in expected]
        found = [(row.token_ids, row.num_chains, row.num_logits) for row in self.step.plan.rows]
        assert found == [(row.token_ids, row.num_chains, row.num_logits) for _, row in expected]
        assert all(row.table_M is r.table_M for row, r in zip(self.step.plan.rows, self.step.answers, strict=True))
        for reader in drafting:
            reader.num_drafts -= 1
        for reader in steps:
            if reader not in drafting:
                reader.num_prompt_tokens = 0

    @precondition(lambda self: self.step is not None)
    @rule()
    def end_step(self) -> None:
        assert set(self.scheduler.end_step()) == set(self.leaving)
        self.gone += self.leaving
        self.leaving, self.step = [], None

    @rule()
    def close(self) -> None:
        assert set(self.scheduler.close()) == {*self.waiting, *self.active, *self.leaving}
        self.gone += [*self.waiting, *self.active, *self.leaving]
        self.waiting, self.active, self.leaving, self.step = [], [], [], None

    @invariant()
    def everybody_knows_its_place(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        num_free = self.max_batch_size - len(self.active)
        for place, reader in enumerate(self.waiting):
            assert self.scheduler.num_ahead(reader) == (None if place < num_free else place - num_free)
        assert all(self.scheduler.num_ahead(reader) is None for reader in [*self.active, *self.leaving, *self.gone])


TestScheduler = SchedulerMachine.TestCase


def test_the_next_comes_in_when_somebody_has_left_and_not_before() -> None:
    scheduler: Scheduler[Reader] = Scheduler(max_batch_size=1)
    first, second = Reader(1), Reader(2)
    for reader in (first, second):
        scheduler.join(reader)
    for _ in range(2):
        step = scheduler.begin_step()
        assert step is not None
        assert step.answers == (first,)
        assert scheduler.num_ahead(second) == 0
        assert scheduler.end_step() == []
    scheduler.begin_step()
    assert not scheduler.leave(first)
    assert scheduler.end_step() == [first]
    step = scheduler.begin_step()
    assert step is not None
    assert step.answers == (second,)


def test_one_clients_crowd_keeps_nobody_else_out() -> None:
    """A hundred requests of one client, and then one of another: it gets the next place but one."""
    scheduler: Scheduler[Reader] = Scheduler(max_batch_size=2)
    crowd, other = [Reader(number) for number in range(100)], Reader(100)
    for reader in crowd:
        scheduler.join(reader, "crowd")
    scheduler.begin_step()
    scheduler.join(other, "other")
    scheduler.end_step()
    assert scheduler.num_ahead(other) == 1
    for leaving in crowd[:2]:
        scheduler.leave(leaving)
    step = scheduler.begin_step()
    assert step is not None
    assert set(step.answers) == {crowd[2], other}


def test_whoever_waits_knows_after_how_many_tokens_it_has_a_place() -> None:
    scheduler: Scheduler[Reader] = Scheduler(max_batch_size=2)
    readers = [Reader(number, num_left=left) for number, left in enumerate((5, 9, 3, 20, 1, 1))]
    for reader in readers:
        scheduler.join(reader)
    scheduler.begin_step()
    # Places are free after 5 and 9 tokens; who takes the first keeps it until 8, and so on.
    assert [scheduler.num_tokens_ahead(reader) for reader in readers[2:]] == [5, 8, 9, 10]


def test_larger_scales_stand_first_and_of_equals_whoever_came_first() -> None:
    scheduler: Scheduler[Reader] = Scheduler(max_batch_size=5)
    readers = [Reader(number, num_chains) for number, num_chains in enumerate([1, 3, 2, 3, 1])]
    for reader in readers:
        scheduler.join(reader)
    step = scheduler.begin_step()
    assert step is not None
    assert [reader.number for reader in step.answers] == [1, 3, 2, 0, 4]
    assert [row.num_chains for row in step.plan.rows] == [3, 3, 2, 1, 1]


def test_prompts_too_long_for_one_step_wait_for_the_next_and_nobody_waits_for_ever() -> None:
    scheduler: Scheduler[Reader] = Scheduler(max_batch_size=9)
    whole, half, small, talker = Reader(0, 1, 1, MAX_PROMPT_TOKENS), Reader(1, 1, 1, 40), Reader(2, 2, 1, 24), Reader(3)
    for reader in (half, whole, small, talker):
        scheduler.join(reader)
    step = scheduler.begin_step()
    assert step is not None
    assert set(step.answers) == {half, small, talker}
    assert step.answers.count(half) == 1 + 2
    half.num_prompt_tokens = small.num_prompt_tokens = 0
    scheduler.join(late := Reader(4, 1, 1, 1))
    assert not scheduler.leave(half)
    assert scheduler.end_step() == [half]
    step = scheduler.begin_step()
    assert step is not None
    assert set(step.answers) == {whole, small, talker}
    whole.num_prompt_tokens = 0
    scheduler.end_step()
    step = scheduler.begin_step()
    assert step is not None
    assert set(step.answers) == {whole, small, talker, late}


def test_a_step_drafts_only_while_everybody_of_more_than_one_chain_wants_to() -> None:
    scheduler: Scheduler[Reader] = Scheduler(max_batch_size=9)
    eager, brief, small = Reader(1, 3, num_drafts=9), Reader(2, 2, num_drafts=1), Reader(3, 1)
    for reader in (eager, brief, small):
        scheduler.join(reader)
    step = scheduler.begin_step()
    assert step is not None
    assert step.drafting == {eager, brief}
    assert step.answers == (eager, brief, small)
    assert {row.num_chains for row in step.plan.rows} == {1}
    brief.num_drafts = 0
    scheduler.end_step()
    step = scheduler.begin_step()
    assert step is not None
    assert step.drafting == set()
    assert [row.num_chains for row in step.plan.rows] == [3, 2, 1]


def test_drafts_give_way_where_a_step_would_be_larger_than_it_may_be() -> None:
    """Somebody came while they drafted; what is left is no larger than a step without drafts."""
    for max_tokens, expected in ((16, [5, 5, 1]), (9, [3, 5, 1]), (4, [1, 2, 1]), (2, [1, 1, 1])):
        scheduler: Scheduler[Reader] = Scheduler(max_batch_size=9, max_tokens=max_tokens)
        for reader in (Reader(1, 3, 5, num_logits=5), Reader(2, 2, 5, num_logits=5), Reader(3, 2)):
            scheduler.join(reader)
        step = scheduler.begin_step()
        assert step is not None
        assert [len(row.token_ids) for row in step.plan.rows] == expected
        assert [row.num_logits for row in step.plan.rows] == expected
        assert [row.chosen_positions[0] for row in step.plan.rows] == [1, 1, 1]


def test_a_step_holds_whoever_leaves_until_it_has_ended() -> None:
    scheduler: Scheduler[Reader] = Scheduler(max_batch_size=2)
    inside, outside = Reader(1), Reader(2)
    scheduler.join(inside)
    scheduler.begin_step()
    scheduler.join(outside)
    assert scheduler.leave(outside)
    assert not scheduler.leave(inside)
    assert not scheduler.leave(inside)
    assert scheduler.end_step() == [inside]
    assert not scheduler.leave(inside)
    assert scheduler.begin_step() is None


def test_a_batch_of_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="max_batch_size=0 must be at least 1"):
        Scheduler(max_batch_size=0)


def test_a_plan_is_never_empty_nor_out_of_order() -> None:
    row = PlanRow((5,), 0, 1, TABLE_M)
    with pytest.raises(AssertionError, match="a step without rows"):
        StepPlan(())
    with pytest.raises(AssertionError, match=r"scales \[1, 2\], expected larger ones first"):
        StepPlan((row, replace(row, num_chains=2)))


@pytest.mark.parametrize(("token_ids", "num_logits"), [((), 0), ((5,), 2), ((5,), -1)])
def test_a_row_reads_tokens_and_asks_for_no_more_logits_than_it_has(
    token_ids: tuple[int, ...], num_logits: int
) -> None:
    with pytest.raises(AssertionError):
        PlanRow(token_ids, 0, 1, TABLE_M, num_logits)
