"""Answers that draft, change their scale, and share pages get to the bit what plain steps give to each alone.

Whatever weights draft: what a draft leaves in the pages, its verification writes over.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from colm_kernels import native
from colm_kernels.quantised import Quantisation
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from colm.checkpoint import Checkpoint, save
from colm.events import FinishReason, Token
from colm.kv import KvFormat
from colm.model.weights import WeightLayout
from colm.sampling import ANY_JSON_OBJECT, Constraint, SamplingParams
from colm.text.detokenizer import Detokenizer, TextStream
from decode_node.constraint import ConstrainedText
from decode_node.drafter import Drafter, Drafting, StepTimes
from decode_node.engine import DecodeEngine
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from decode_node.page_pool import PageLease, PagePool
from decode_node.plan import MAX_DRAFT_TOKENS, PlanRow, StepPlan
from decode_node.running_answer import RunningAnswer
from decode_node.sampler import Choice, choose
from decode_node.scheduler import Scheduler, Step
from decode_node.settings import KvCacheDtype
from decode_node.step_budget import StepBudget
from tests.constraints import grammar_of
from tests.shared_pages import SharedPages
from tests.tiny import random_tensors, tiny_config, tiny_tokenizer

PAGE_TOKENS = 8
TILE_TOKENS = 2 * PAGE_TOKENS
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
    num_pages: int = 64,
    draft_weights: Quantisation | None = None,
) -> tuple[DecodeEngine, KvStore]:
    checkpoint = model(later)
    store = KvStore(KvLayout(KvFormat.of(checkpoint.config, dtype), PAGE_TOKENS, cache_dtype), num_pages)
    for stale in (store.k_scales_LBPK, store.v_scales_LBPK, store.k_pages_LBPKD, store.v_pages_LBPKD):
        if stale is not None and stale.is_floating_point():
            stale.fill_(torch.nan)
    layout = WeightLayout(dtype=dtype, quantisation=quantisation)
    return DecodeEngine(checkpoint, store, weights=layout, draft_weights=draft_weights), store


# Pages are used again and again: what is stale in them must not matter.
# Answers that share nothing take up to nine times as many.
plain_engine, mixed_engine = cache(partial(engine_of, num_pages=9 * 32)), cache(partial(engine_of, num_pages=32))


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
    num_brought: int
    """Tokens of the prompt that others bring, or have brought; it reads the rest itself."""

    def answer(self, table_M: NDArray[np.int32], *, drafts: bool, num_brought: int = 0) -> RunningAnswer:
        return RunningAnswer(
            unread_token_ids=self.prompt[num_brought:],
            position=num_brought,
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
    prefill: asyncio.Task[None] | None = None
    """Brings its prompt; it joins the scheduler as that ends."""
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
    """The decode loop without its thread: a scheduler, an engine, and pages that prompts share."""

    def __init__(
        self,
        engine: DecodeEngine,
        store: KvStore,
        max_batch_size: int,
        budget: StepBudget,
        num_pages: int,
        max_idle_pages: int,
    ) -> None:
        self.engine, self.store = engine, store
        self.pages = SharedPages(
            engine, store, num_pages=num_pages, max_idle_pages=max_idle_pages, tile_tokens=TILE_TOKENS
        )
        self.budget = budget
        self.scheduler: Scheduler[Member] = Scheduler(max_batch_size=max_batch_size, budget=budget)
        self.members: list[Member] = []
        self.step: Step[Member] | None = None

    def join(self, ask: Ask, *, drafts: bool) -> Member | None:
        if (reserved := self.pages.reserve(ask.prompt, ask.max_new_tokens, ask.num_brought)) is None:
            return None
        table_M = self.store.page_table(reserved.pages)
        answer = ask.answer(table_M, drafts=drafts, num_brought=ask.num_brought)
        member = Member(ask, answer, reserved.pages, ask.num_chains)
        self.members.append(member)

        def prompt_ended(is_here: bool) -> None:
            if is_here:
                self.scheduler.join(member)
            else:
                self._release(member)

        member.prefill = self.pages.bring(reserved, prompt_ended)
        return member

    def begin(self) -> None:
        for member in self.scheduler.answers:
            member.answer.num_chains = member.wanted_chains
        num_unread = {member: member.num_unread for member in self.scheduler.answers}
        self.step = self.scheduler.begin_step()
        if self.step is None:
            return
        # Nobody starves, and nobody waits for more than the budget.
        num_tokens = sum(len(row.token_ids) for row in self.step.plan.rows)
        prompts = [member for member in self.scheduler.active if num_unread[member] > 1]
        going = {*self.scheduler.active}.difference(prompts)
        assert num_tokens <= self.budget.tokens(len(going))
        assert going.union(prompts[:1]) <= {*self.step.answers}

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
                (outcome,) = of_row
                member.answer.add_draft(outcome.token_id if isinstance(outcome, Choice) else outcome)
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
        if member.prefill is not None and not member.prefill.done():
            self.pages.cancel(member.prefill)
            self._release(member)
        elif self.scheduler.leave(member):
            self._release(member)

    def _release(self, member: Member) -> None:
        self.pages.page_line.release(member.pages)
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
DOCUMENTS = [tuple(np.random.default_rng(seed).integers(3, 300, 40).tolist()) for seed in range(2)]
OF_DOCUMENTS = st.builds(
    lambda document, num_tokens, end: (*document[:num_tokens], *end),
    st.sampled_from([DOCUMENTS[0], *DOCUMENTS]),
    # In whole tiles, or pages, or within a page; the last token of a prompt is never brought.
    st.sampled_from([TILE_TOKENS, TILE_TOKENS + PAGE_TOKENS, 2 * TILE_TOKENS, 37]),
    st.sampled_from([(5,), (5,), (20, 9), (300, 40, 3, 7)]),
)
# (prompt, whether it is brought)
PROMPTS = st.one_of(
    st.tuples(st.sampled_from([(5,), (20, 9), (300, 40, 3, 7), tuple(range(30, 67))]), st.just(False)),
    *2 * [st.tuples(OF_DOCUMENTS, st.just(True))],
)
ASKS = st.builds(
    lambda prompt, **options: Ask(prompt=prompt[0], num_brought=prompt[1] * (len(prompt[0]) - 1), **options),
    prompt=PROMPTS,
    num_chains=st.sampled_from([3, 3, 2, 1]),
    max_new_tokens=st.sampled_from([1, 2, 9, 25]),
    sampling=SAMPLING,
    wishes=st.lists(st.integers(0, MAX_DRAFT_TOKENS), min_size=1, max_size=3).map(tuple),
)


class DraftingMachine(RuleBasedStateMachine):
    """Answers that come, wait, find others' pages or read prompts in pieces, draft, change their scale, and go.

    Each is held to itself alone, which reads its whole prompt in one step, drafts nothing and shares nothing.
    """

    @initialize(
        later=st.sampled_from(["zero", "small", "random"]),
        max_batch_size=st.sampled_from([1, 2, 4]),
        step_tokens=st.sampled_from([2, 3, 8, 16, 64]),
        pages=st.sampled_from([(12, 12), (20, 6), (32, 32)]),
        draft_weights=st.sampled_from([None, "q4", "int8"]),
    )
    def create(
        self,
        later: str,
        max_batch_size: int,
        step_tokens: int,
        pages: tuple[int, int],
        draft_weights: Quantisation | None,
    ) -> None:
        budget = StepBudget(step_tokens=step_tokens, max_tokens=2 * step_tokens)
        self.later, self.draft_weights = later, draft_weights
        engine = mixed_engine(later, draft_weights=draft_weights)
        self.batch = Batch(*engine, max_batch_size, budget, *pages)
        self.plain_pool = PagePool(plain_engine(later)[1].num_pages)
        self.plain: dict[Member, Plain] = {}

    @rule(
        asks=st.lists(ASKS, min_size=1, max_size=3),
        drafts=st.sampled_from([True, True, False]),
        comes_at_once=st.booleans(),
    )
    def join(self, asks: list[Ask], drafts: bool, comes_at_once: bool) -> None:
        for ask in asks:
            if (member := self.batch.join(ask, drafts=drafts)) is not None:
                self.plain[member] = Plain(self.later, ask, self.plain_pool)
        while comes_at_once and self.batch.pages.arrivals:
            self.batch.pages.arrive(self.batch.pages.arrivals[0])

    @precondition(lambda self: self.batch.pages.arrivals)
    @rule(data=st.data(), fails=st.sampled_from([False, False, False, True]))
    def arrive(self, data: st.DataObject, fails: bool) -> None:
        """Also while a step runs, which reads other pages."""
        self.batch.pages.arrive(data.draw(st.sampled_from(self.batch.pages.arrivals)), fails=fails)

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
        self.batch.pages.page_line.cache.check_integrity()
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
            # Quantised weights may draft otherwise than all chains choose.
            if (
                self.later == "zero"
                and self.draft_weights is None
                and HAS_OWN_BITS
                and answer.finish_reason is FinishReason.LENGTH
            ):
                assert answer.num_accepted_tokens == answer.num_draft_tokens

    def teardown(self) -> None:
        if not hasattr(self, "batch"):
            return
        while self.batch.pages.arrivals:
            self.batch.pages.arrive(self.batch.pages.arrivals[0])
        while self.batch.members:
            if self.batch.step is None:
                self.batch.begin()
            self.batch.end()
        self.every_answer_is_the_plain_one()
        self.batch.pages.close()
        assert self.plain_pool.num_used == 0


TestDrafting = DraftingMachine.TestCase
TestDrafting.settings = settings(max_examples=30, stateful_step_count=18, deadline=None)
