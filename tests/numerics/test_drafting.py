"""Answers that draft, and that change their scale on the way, get to the bit what plain steps give."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from colm_kernels import native, tolerance
from colm_kernels.decode_attention import MAX_QUERY_TOKENS
from colm_kernels.quantised import Quantisation
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray
from torch import Tensor

from colm.checkpoint import Checkpoint, save
from colm.events import FinishReason, Token
from colm.kv import KvFormat
from colm.model.weights import WeightLayout
from colm.sampling import ANY_JSON_OBJECT, Constraint, SamplingParams
from colm.text.detokenizer import Detokenizer, TextStream
from decode_node.constraint import ConstrainedText
from decode_node.drafter import Drafter, Drafting, StepTimes
from decode_node.engine import DecodeEngine
from decode_node.kv_layout import KvCacheDtype, KvLayout
from decode_node.kv_store import KvStore
from decode_node.page_pool import PageLease, PagePool
from decode_node.plan import MAX_DRAFT_TOKENS, PlanRow, StepPlan
from decode_node.running_answer import RunningAnswer
from decode_node.sampler import choose
from decode_node.scheduler import Scheduler, Step
from decode_node.step_budget import StepBudget
from tests.constraints import grammar_of
from tests.tiny import random_tensors, tiny_config, tiny_tokenizer

PAGE_TOKENS = 8
HAS_OWN_BITS = native.default_variant(torch.float32) != "torch"
"""Whether a row's bits are its own; PyTorch's depend on the rows beside it."""
TOKENIZER = tiny_tokenizer()
AMPLE = StepBudget(step_tokens=64, max_tokens=64)


@cache
def model(later: str) -> Checkpoint:
    """A tiny model whose later chains add nothing, something or everything to the logits."""
    config = tiny_config(hidden_dim=8 * 32)
    tensors = random_tensors(config)
    factor = {"zero": 0.0, "small": 0.05, "random": 1.0}[later]
    for name, tensor in tensors.items():
        if name.startswith("head.") and not name.endswith("chain1"):
            tensor *= factor
    return save(Path(mkdtemp()) / later, config, tensors)


def engine_of(
    later: str,
    dtype: torch.dtype = torch.float32,
    cache_dtype: KvCacheDtype = "model",
    quantisation: Quantisation | None = None,
) -> tuple[DecodeEngine, KvStore]:
    checkpoint = model(later)
    store = KvStore(KvLayout(KvFormat.of(checkpoint.config, dtype), PAGE_TOKENS, cache_dtype), 64)
    for stale in (store.k_scales_LBPK, store.v_scales_LBPK, store.k_pages_LBPKD, store.v_pages_LBPKD):
        if stale is not None and stale.is_floating_point():
            stale.fill_(torch.nan)
    return DecodeEngine(checkpoint, store, weights=WeightLayout(dtype=dtype, quantisation=quantisation)), store


# Pages are used again and again: what is stale in them must not matter.
plain_engine, mixed_engine = cache(engine_of), cache(engine_of)


class Wishes(Drafter):
    """Wants a number of drafts that a test draws anew for each round."""

    def __init__(self, wishes: tuple[int, ...]) -> None:
        super().__init__(Drafting(StepTimes((1, 2), max_tokens=64), MAX_DRAFT_TOKENS), MAX_DRAFT_TOKENS)
        self._wishes = wishes
        self._num_rounds = 0

    def num_drafts(self, num_answers: int) -> int:
        self._num_rounds += 1
        return min(self._wishes[self._num_rounds % len(self._wishes)], 64 // num_answers - 1)


@dataclass(frozen=True)
class Ask:
    """What an answer is asked for."""

    prompt: tuple[int, ...]
    num_chains: int
    max_new_tokens: int
    sampling: SamplingParams
    wishes: tuple[int, ...]
    """Drafts of each round, in turns."""

    def answer(self, table_M: NDArray[np.int32], *, drafts: bool) -> RunningAnswer:
        return RunningAnswer(
            unread_token_ids=self.prompt,
            position=0,
            num_chains=self.num_chains,
            max_new_tokens=self.max_new_tokens,
            table_M=table_M,
            sampling=self.sampling,
            stop_token_ids={2, *self.sampling.stop_token_ids},
            text_stream=TextStream(Detokenizer(TOKENIZER)),
            drafter=Wishes(self.wishes) if drafts else None,
            prompt_token_ids=self.prompt,
            constrained=self.sampling.constraint and ConstrainedText(grammar_of(self.sampling.constraint)),
        )


@dataclass(eq=False)
class Member:
    """An answer in the batch."""

    ask: Ask
    answer: RunningAnswer
    pages: PageLease
    wanted_chains: int
    """Of the steps to come."""
    tokens: list[Token] = field(default_factory=list)

    @property
    def num_chains(self) -> int:
        return self.answer.num_chains

    @property
    def num_left(self) -> int:
        return self.answer.num_left

    @property
    def num_unread(self) -> int:
        return self.answer.num_unread

    @property
    def num_drafts(self) -> int:
        return self.answer.num_drafts

    def draft_row(self, num_answers: int) -> PlanRow | None:
        return self.answer.draft_row(num_answers)

    def next_rows(self, max_tokens: int) -> list[PlanRow]:
        return self.answer.next_rows(max_tokens)


class Batch:
    """The decode loop without its thread: a scheduler, an engine, and pages."""

    def __init__(
        self, engine: DecodeEngine, store: KvStore, max_batch_size: int = 1, budget: StepBudget = AMPLE
    ) -> None:
        self.engine, self.store = engine, store
        self.pool = PagePool(self.store.num_pages)
        self.budget = budget
        self.scheduler: Scheduler[Member] = Scheduler(max_batch_size=max_batch_size, budget=budget)
        self.members: list[Member] = []
        self.step: Step[Member] | None = None

    def join(self, ask: Ask, *, drafts: bool) -> Member | None:
        num_pages = self.store.layout.pages(len(ask.prompt) + ask.max_new_tokens)
        if (pages := self.pool.reserve("request", num_pages)) is None:
            return None
        member = Member(ask, ask.answer(self.store.page_table(pages), drafts=drafts), pages, ask.num_chains)
        self.scheduler.join(member)
        self.members.append(member)
        return member

    def begin(self) -> None:
        for member in self.scheduler.answers:
            member.answer.num_chains = member.wanted_chains
        num_unread = {member: member.num_unread for member in self.scheduler.answers}
        self.step = self.scheduler.begin_step()
        if self.step is None:
            return
        # Nobody starves, and nobody waits for more than the budget.
        num_tokens = [self.step.num_tokens(member) for member in {*self.step.answers}]
        goes_on = any(num_unread[member] == 1 for member in self.step.answers)
        assert sum(num_tokens) <= self.budget.tokens(len(num_tokens), goes_on=goes_on)
        assert {*self.step.answers} == {*self.scheduler.active}

    def end(self) -> None:
        assert self.step is not None
        plan = self.step.plan
        for row, member in zip(plan.rows, self.step.answers, strict=True):
            assert row.position + len(row.token_ids) <= len(member.ask.prompt) + member.ask.max_new_tokens
        samplers = [
            member.answer.sampler
            for member, row in zip(self.step.answers, plan.rows, strict=True)
            for _ in range(row.num_logits)
        ]
        positions = [position for row in plan.rows for position in row.chosen_positions]
        outcomes = choose(samplers, positions, self.engine.step(plan))
        for member, row in zip(self.step.answers, plan.rows, strict=True):
            of_row, outcomes = outcomes[: row.num_logits], outcomes[row.num_logits :]
            if member in self.step.drafting:
                member.answer.add_draft(of_row[0])
            elif not any(
                each.num_logits for each, of in zip(plan.rows, self.step.answers, strict=True) if of is member
            ):
                member.answer.note_read(len(row.token_ids))
            elif of_row:
                member.tokens += member.answer.advance(of_row)
                if member.answer.finish_reason is not None:
                    self.leave(member)
        out = self.scheduler.end_step()
        self.step = None
        for member in out:
            self._release(member)

    def leave(self, member: Member) -> None:
        if self.scheduler.leave(member):
            self._release(member)

    def _release(self, member: Member) -> None:
        self.pool.release(member.pages)
        self.members.remove(member)


class Plain:
    """An answer alone and without drafts, which takes the scale of each token from the answer that is held to it."""

    def __init__(self, later: str, ask: Ask, pool: PagePool) -> None:
        self._engine, store = plain_engine(later)
        pages = pool.reserve("plain", store.layout.pages(len(ask.prompt) + ask.max_new_tokens))
        assert pages is not None
        self._pool, self._pages = pool, pages
        self.answer = ask.answer(store.page_table(pages), drafts=False)
        self.tokens: list[Token] = []

    def follow(self, tokens: Sequence[Token]) -> None:
        for token in tokens[len(self.tokens) :]:
            self.answer.num_chains = token.num_chains
            plan = StepPlan(tuple(self.answer.next_rows()))
            positions = [position for row in plan.rows for position in row.chosen_positions]
            self.tokens += self.answer.advance(choose([self.answer.sampler], positions, self._engine.step(plan)))

    def let_go(self) -> None:
        self._pool.release(self._pages)


def seen(tokens: list[Token]) -> list[object]:
    """What must be equal: everything where rows have their own bits, else what was chosen."""
    return [token if HAS_OWN_BITS else (token.token_id, token.text, token.num_chains) for token in tokens]


SAMPLING = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.5, 1.5]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    seed=st.integers(0, 3),
    stop=st.sampled_from([(), ("e",), ("th", "\N{REPLACEMENT CHARACTER}")]),
    stop_token_ids=st.sampled_from([(), (17, 40, 60)]),
    top_logprobs=st.sampled_from([0, 2]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.3]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.2]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    logit_bias=st.sampled_from([(), ((2, 1.0), (17, 0.5))]),
    min_tokens=st.sampled_from([0, 0, 1]),
    constraint=st.sampled_from([None, None, ANY_JSON_OBJECT, Constraint(kind="regex", text="( [a-d]{1,5}|the){1,9}")]),
)
ASKS = st.builds(
    Ask,
    prompt=st.sampled_from([(5,), (20, 9), (300, 40, 3, 7), tuple(range(30, 67))]),
    num_chains=st.sampled_from([3, 3, 2, 1]),
    max_new_tokens=st.sampled_from([1, 2, 9, 25]),
    sampling=SAMPLING,
    wishes=st.lists(st.integers(0, MAX_DRAFT_TOKENS), min_size=1, max_size=3).map(tuple),
)


class DraftingMachine(RuleBasedStateMachine):
    """Answers that come, wait, read prompts in pieces, draft, change their scale, and go.

    Each is held to itself alone, without drafts and with its prompt in one step.
    """

    @initialize(
        later=st.sampled_from(["zero", "small", "random"]),
        max_batch_size=st.sampled_from([1, 2, 4]),
        step_tokens=st.sampled_from([1, 3, 8, 16, 64]),
    )
    def create(self, later: str, max_batch_size: int, step_tokens: int) -> None:
        budget = StepBudget(step_tokens=step_tokens, max_tokens=2 * step_tokens)
        self.later, self.batch = later, Batch(*mixed_engine(later), max_batch_size, budget)
        self.plain_pool = PagePool(plain_engine(later)[1].num_pages)
        self.plain: dict[Member, Plain] = {}

    @rule(ask=ASKS, drafts=st.sampled_from([True, True, False]))
    def join(self, ask: Ask, drafts: bool) -> None:
        member = self.batch.join(ask, drafts=drafts)
        if member is not None:
            self.plain[member] = Plain(self.later, ask, self.plain_pool)

    @precondition(lambda self: self.batch.step is None)
    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.batch.begin()
            if self.batch.step is not None:
                self.batch.end()

    @precondition(lambda self: self.batch.step is None)
    @rule()
    def begin(self) -> None:
        self.batch.begin()

    @precondition(lambda self: self.batch.step is not None)
    @rule()
    def end(self) -> None:
        self.batch.end()

    @precondition(lambda self: self.batch.members)
    @rule(data=st.data(), num_chains=st.integers(1, 3))
    def change_scale(self, data: st.DataObject, num_chains: int) -> None:
        data.draw(st.sampled_from(self.batch.members)).wanted_chains = num_chains

    @precondition(lambda self: self.batch.members)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.batch.leave(data.draw(st.sampled_from(self.batch.members)))

    @invariant()
    def every_answer_is_the_plain_one(self) -> None:
        if not hasattr(self, "batch"):
            return
        self.batch.pool.check_integrity()
        self.batch.scheduler.check_integrity()
        for member, plain in [*self.plain.items()]:
            plain.follow(member.tokens)
            assert seen(member.tokens) == seen(plain.tokens)
            answer = member.answer
            assert answer.num_new_tokens == len(member.tokens)
            assert answer.num_accepted_tokens <= min(answer.num_draft_tokens, len(member.tokens))
            assert (answer.tail, answer.finish_reason) == (plain.answer.tail, plain.answer.finish_reason)
            if member not in self.batch.members:
                plain.let_go()
                del self.plain[member]
            if self.later == "zero" and HAS_OWN_BITS and answer.finish_reason is FinishReason.LENGTH:
                assert answer.num_accepted_tokens == answer.num_draft_tokens

    def teardown(self) -> None:
        if not hasattr(self, "batch"):
            return
        while self.batch.members:
            if self.batch.step is None:
                self.batch.begin()
            self.batch.end()
        self.every_answer_is_the_plain_one()
        assert self.batch.pool.num_used == self.plain_pool.num_used == 0


TestDrafting = DraftingMachine.TestCase
TestDrafting.settings = settings(max_examples=20, stateful_step_count=14, deadline=None)


def beside_it(num_tokens: int) -> tuple[PlanRow, ...]:
    """Other answers' rows of so many tokens, at scale 2, each in pages of its own."""
    starts = range(0, num_tokens, MAX_QUERY_TOKENS)
    tables = [np.arange(40 + 2 * place, 42 + 2 * place, dtype=np.int32) for place in range(len(starts))]
    return tuple(
        PlanRow((7,) * min(MAX_QUERY_TOKENS, num_tokens - start), 0, 2, table_M)
        for start, table_M in zip(starts, tables, strict=True)
    )


def assert_same(ours: Tensor, one_by_one: Tensor, over: KvCacheDtype = "model") -> None:
    """To the bit where rows have their own; else within the budget of layers, of bf16 over pages of int8.

    There, a number between two whole ones may be rounded to either.
    """
    if HAS_OWN_BITS:
        assert torch.equal(ours, one_by_one)
    elif ours.dtype == torch.int8:
        assert (ours.int() - one_by_one.int()).abs().max() <= 1
    else:
        config = model("random").config
        dtype = torch.bfloat16 if over == "int8" else ours.dtype
        exact = one_by_one.double()
        tolerance.layers(exact, dtype, num_layers=config.num_layers, width=config.dim).check(ours.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("num_drafts", "cache_dtype", "quantisation"),
    [
        *((num_drafts, "model", None) for num_drafts in (1, 3, 7, MAX_DRAFT_TOKENS)),
        (7, "int8", None),
        (7, "model", "q4"),
        (MAX_DRAFT_TOKENS, "model", "int8"),
    ],
)
def test_a_verification_has_the_bits_of_single_steps(
    dtype: torch.dtype, num_drafts: int, cache_dtype: KvCacheDtype, quantisation: Quantisation | None
) -> None:
    """Logits, keys and values of k + 1 rows are those of k + 1 steps, over what chain 1's drafts have written.

    Alone, and beside as many tokens of others as keep the bits: 64 in all, or 16 where weights lie by rows.
    """
    engine, store = engine_of("random", dtype, cache_dtype, quantisation)
    text = np.random.default_rng(1).integers(3, 300, 10 + num_drafts + 1).tolist()
    singly, together = (np.arange(start, start + 8, dtype=np.int32) for start in (0, 32))
    for table_M in (singly, together):
        engine.step(StepPlan((PlanRow(tuple(text[:10]), 0, 1, table_M, num_logits=0),)))
    for position in range(10, len(text) - 1):  # the drafts
        engine.step(StepPlan((PlanRow((text[position],), position, 1, together),)))
    alone_QV = torch.cat([engine.step(StepPlan((PlanRow((text[at],), at, 3, singly),))) for at in range(10, len(text))])
    row = PlanRow(tuple(text[10:]), 10, 3, together, num_logits=num_drafts + 1)
    for beside in ((), beside_it(engine.max_exact_tokens - num_drafts - 1)):
        verified_QV = engine.step(StepPlan((row, *beside)))[: num_drafts + 1]
        assert_same(verified_QV, alone_QV, over=cache_dtype)
    for pages_LBPKD in (store.k_pages_LBPKD, store.v_pages_LBPKD, store.k_scales_LBPK, store.v_scales_LBPK):
        if pages_LBPKD is None:
            continue
        ours, one_by_one = (
            pages_LBPKD[:, torch.from_numpy(table_M).long()].flatten(1, 2)[:, : len(text)]
            for table_M in (together, singly)
        )
        assert_same(ours, one_by_one)
