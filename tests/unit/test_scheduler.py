"""Who takes part in which step: nobody overtakes, nobody is out while a step holds it, nobody stays for ever."""

from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from decode_node.plan import PlanRow, StepPlan
from decode_node.scheduler import Scheduler, Step
from decode_node.step_budget import StepBudget

TABLE_M = np.zeros(4, dtype=np.int32)
AMPLE = StepBudget(step_tokens=64, max_tokens=64)


@dataclass(eq=False)
class Reader:
    """An answer at any scale, with a prompt to read before its next token, or drafts to verify behind it."""

    number: int
    num_chains: int = 1
    num_drafts: int = 0
    """That wait to be verified."""
    num_unread: int = 1
    num_to_draft: int = 0
    """How many more tokens it wants to draft."""
    num_left: int = 9
    position: int = 0
    table_M: NDArray[np.int32] = field(default_factory=TABLE_M.copy)

    def draft_row(self, num_answers: int) -> PlanRow | None:
        assert num_answers >= 1
        return PlanRow((self.number,), self.position, 1, self.table_M) if self.num_to_draft else None

    def next_rows(self, max_tokens: int) -> list[PlanRow]:
        assert max_tokens >= 1
        row = partial(PlanRow, table_M=self.table_M)
        earlier, rows = min(max_tokens, self.num_unread - 1), []
        if max_tokens >= self.num_unread:
            count = 1 + min(self.num_drafts, max_tokens - self.num_unread)
            rows = [row((self.number,) * count, self.num_unread - 1, self.num_chains, num_logits=count)]
        pieces = [(start, min(16, earlier - start)) for start in range(0, earlier, 16)]
        return rows + [row((self.number,) * count, start, 1, num_logits=0) for start, count in pieces]

    def note(self, num_tokens: int) -> None:
        """A step has read so many."""
        self.num_drafts = 0
        self.num_unread = max(1, self.num_unread - num_tokens)


def rows_of(reader: Reader, num_tokens: int) -> list[PlanRow]:
    """None where it takes no part."""
    return reader.next_rows(num_tokens) if num_tokens else []


class SchedulerMachine(RuleBasedStateMachine):
    """Against a model that is three lists, and the rules by which a budget is divided."""

    @initialize(max_batch_size=st.integers(1, 6), step_tokens=st.integers(2, 24), max_tokens=st.integers(1, 64))
    def create(self, max_batch_size: int, step_tokens: int, max_tokens: int) -> None:
        self.max_batch_size = max_batch_size
        self.budget = StepBudget(step_tokens=step_tokens, max_tokens=max_tokens)
        self.scheduler: Scheduler[Reader] = Scheduler(max_batch_size=max_batch_size, budget=self.budget)
        self.waiting: list[Reader] = []
        self.active: list[Reader] = []
        self.leaving: list[Reader] = []
        self.gone: list[Reader] = []
        self.step: Step[Reader] | None = None
        self.num_joined = 0

    @rule(
        num_chains=st.integers(1, 3),
        num_drafts=st.integers(0, 15),
        num_unread=st.just(1) | st.integers(2, 90),
        num_to_draft=st.integers(0, 3),
    )
    def join(self, num_chains: int, num_drafts: int, num_unread: int, num_to_draft: int) -> None:
        is_new = num_unread > 1  # and has drafted nothing
        reader = Reader(self.num_joined, num_chains, num_drafts * (not is_new), num_unread, num_to_draft * (not is_new))
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
        self.step = step = self.scheduler.begin_step()
        if step is None:
            assert not self.active
            return
        large = [reader for reader in self.active if reader.num_chains > 1]
        drafting = large if all(reader.num_to_draft for reader in large) else []
        assert step.drafting == set(drafting)
        # Larger scales first, and of equals whoever came first: neighbours keep their rows from step to step.
        num_tokens = {reader: step.num_tokens(reader) for reader in self.active}
        expected = sorted(
            (
                (reader, row)
                for reader in self.active
                for row in ([reader.draft_row(1)] if reader in drafting else rows_of(reader, num_tokens[reader]))
                if row is not None
            ),
            key=lambda pair: -pair[1].num_chains,
        )
        assert list(step.answers) == [reader for reader, _ in expected]
        found = [(row.token_ids, row.position, row.num_chains, row.num_logits) for row in step.plan.rows]
        assert found == [(row.token_ids, row.position, row.num_chains, row.num_logits) for _, row in expected]
        assert all(row.table_M is r.table_M for row, r in zip(step.plan.rows, step.answers, strict=True))
        self.assert_the_budget_is_kept_and_used(drafting)
        for reader in drafting:
            reader.num_to_draft -= 1
        for reader in self.active:
            if reader not in drafting:
                reader.note(num_tokens[reader])

    def assert_the_budget_is_kept_and_used(self, drafting: list[Reader]) -> None:
        """Who goes on, and the first prompt, get on; then the shortest, then drafts; nothing wanted is left over."""
        assert self.step is not None
        num_tokens = {reader: self.step.num_tokens(reader) for reader in self.active}
        prompts = [reader for reader in self.active if reader.num_unread > 1 and reader not in drafting]
        going = [reader for reader in self.active if reader not in prompts]
        assert all(num_tokens[reader] >= 1 for reader in [*going, *prompts[:1]])
        limit = self.budget.tokens(len(going))
        assert sum(num_tokens.values()) <= limit
        wanted = {r: 1 if r in drafting else r.num_unread + r.num_drafts for r in self.active}
        assert all(num_tokens[reader] <= wanted[reader] for reader in self.active)
        cut = [reader for reader in self.active if num_tokens[reader] < wanted[reader]]
        assert not cut or sum(num_tokens.values()) == limit
        cut_prompts = [reader for reader in prompts if reader in cut]
        if not cut_prompts:
            return
        assert all(num_tokens[reader] == 1 for reader in going)
        shortest = min(reader.num_unread for reader in cut_prompts)
        assert all(num_tokens[r] == 0 for r in prompts[1:] if r.num_unread > shortest)
        if prompts[0].num_unread > shortest:
            room = limit - len(going)
            assert num_tokens[prompts[0]] == min(prompts[0].num_unread, max(1, room // 4))

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
TestScheduler.settings = settings(max_examples=50, deadline=None)


def test_the_next_comes_in_when_somebody_has_left_and_not_before() -> None:
    scheduler: Scheduler[Reader] = Scheduler(max_batch_size=1, budget=AMPLE)
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
    scheduler: Scheduler[Reader] = Scheduler(max_batch_size=2, budget=AMPLE)
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
    scheduler: Scheduler[Reader] = Scheduler(max_batch_size=2, budget=AMPLE)
    readers = [Reader(number, num_left=left) for number, left in enumerate((5, 9, 3, 20, 1, 1))]
    for reader in readers:
        scheduler.join(reader)
    scheduler.begin_step()
    # Places are free after 5 and 9 tokens; who takes the first keeps it until 8, and so on.
    assert [scheduler.num_tokens_ahead(reader) for reader in readers[2:]] == [5, 8, 9, 10]


def test_larger_scales_stand_first_and_of_equals_whoever_came_first() -> None:
    scheduler: Scheduler[Reader] = Scheduler(max_batch_size=5, budget=AMPLE)
    readers = [Reader(number, num_chains) for number, num_chains in enumerate([1, 3, 2, 3, 1])]
    for reader in readers:
        scheduler.join(reader)
    step = scheduler.begin_step()
    assert step is not None
    assert [reader.number for reader in step.answers] == [1, 3, 2, 0, 4]
    assert [row.num_chains for row in step.plan.rows] == [3, 3, 2, 1, 1]


def counts_of(scheduler: Scheduler[Reader], *readers: Reader) -> list[int]:
    """Run a step; how many tokens each of these has read in it."""
    step = scheduler.begin_step()
    assert step is not None
    counts = [step.num_tokens(reader) for reader in readers]
    for reader in {*step.answers}:
        reader.note(step.num_tokens(reader))
    scheduler.end_step()
    return counts


def test_a_long_prompt_is_read_in_pieces_beside_an_answer_and_a_short_one_goes_first() -> None:
    scheduler: Scheduler[Reader] = Scheduler(max_batch_size=9, budget=StepBudget(step_tokens=12, max_tokens=64))
    long, short, talker = Reader(0, 2, num_unread=100), Reader(1, 1, num_unread=8), Reader(2)
    for reader in (long, talker):
        scheduler.join(reader)
    assert counts_of(scheduler, long, talker) == [11, 1]
    scheduler.join(short)
    # Whoever came first keeps a quarter.
    assert counts_of(scheduler, long, short, talker) == [3, 8, 1]
    assert counts_of(scheduler, long, short, talker) == [12, 1, 1]
    for reader in (short, talker):
        scheduler.leave(reader)
    # Nobody waits for this one's steps any more.
    assert counts_of(scheduler, long) == [64]
    assert long.num_unread == 100 - 11 - 3 - 12 - 64


def test_a_crowd_of_short_prompts_keeps_no_long_one_out() -> None:
    scheduler: Scheduler[Reader] = Scheduler(max_batch_size=9, budget=StepBudget(step_tokens=8, max_tokens=16))
    scheduler.join(long := Reader(0, num_unread=200))
    for number in range(1, 60):
        for reader in (newcomers := [Reader(number, num_unread=4) for _ in range(5)]):
            scheduler.join(reader)
        counts = counts_of(scheduler, long, *newcomers)
        assert counts[0] >= 4 or long.num_unread == 1
        for reader in newcomers:
            scheduler.leave(reader)
        if long.num_unread == 1:
            return
    raise AssertionError("it has not ended")


def test_a_larger_batch_has_more_room_for_prompts() -> None:
    """Else too few would come into it to keep it full."""
    scheduler: Scheduler[Reader] = Scheduler(max_batch_size=9, budget=StepBudget(step_tokens=6, max_tokens=64))
    talkers, newcomer = [Reader(number) for number in range(8)], Reader(8, num_unread=20)
    for reader in (*talkers, newcomer):
        scheduler.join(reader)
    assert counts_of(scheduler, *talkers, newcomer) == [1] * 8 + [12]
    assert counts_of(scheduler, *talkers, newcomer) == [1] * 8 + [8]


def test_a_step_drafts_only_while_everybody_of_more_than_one_chain_wants_to() -> None:
    scheduler: Scheduler[Reader] = Scheduler(max_batch_size=9, budget=AMPLE)
    eager, brief, small = Reader(1, 3, num_to_draft=9), Reader(2, 2, num_to_draft=1), Reader(3, 1)
    for reader in (eager, brief, small):
        scheduler.join(reader)
    step = scheduler.begin_step()
    assert step is not None
    assert step.drafting == {eager, brief}
    assert step.answers == (eager, brief, small)
    assert {row.num_chains for row in step.plan.rows} == {1}
    brief.num_to_draft = 0
    scheduler.end_step()
    step = scheduler.begin_step()
    assert step is not None
    assert step.drafting == set()
    assert [row.num_chains for row in step.plan.rows] == [3, 2, 1]


def test_drafts_give_way_where_a_step_would_be_larger_than_it_may_be() -> None:
    """Somebody came while they drafted: first everybody's next token, then prompts, then drafts."""
    for step_tokens, expected in ((14, [5, 5, 3]), (10, [5, 4, 3]), (6, [4, 1, 3]), (2, [1, 1, 2])):
        budget = StepBudget(step_tokens=step_tokens, max_tokens=64)
        scheduler: Scheduler[Reader] = Scheduler(max_batch_size=9, budget=budget)
        drafted = [Reader(1, 3, num_drafts=4), Reader(2, 2, num_drafts=4)]
        newcomer = Reader(3, 2, num_unread=3)
        for reader in (*drafted, newcomer):
            scheduler.join(reader)
        step = scheduler.begin_step()
        assert step is not None
        assert [step.num_tokens(reader) for reader in (*drafted, newcomer)] == expected
        of_drafts = [
            row.num_logits for row, reader in zip(step.plan.rows, step.answers, strict=True) if reader in drafted
        ]
        assert of_drafts == expected[:2]


def test_a_step_holds_whoever_leaves_until_it_has_ended() -> None:
    scheduler: Scheduler[Reader] = Scheduler(max_batch_size=2, budget=AMPLE)
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
        Scheduler(max_batch_size=0, budget=AMPLE)


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
