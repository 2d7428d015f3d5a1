"""What drafts gain: `python -m bench.draft --json --output bench/results/draft.json`.

Answers at full scale through the decode loop, as a decode node runs it, from a cache that holds noise:

    plain     a node that drafts nothing (decode.max_draft_tokens = 0)
    drafts    chain 1's weights in int8 draft as many tokens as pay, at most `--max-draft-tokens`
    first     the same on a node that has answered nobody yet: it knows what it measured as it started
    off       a node that may draft, and answers that do not ask for it: must cost nothing; in turns of a few tokens,
              many of them, against plain ones

Beside them are the engine's own steps: `draft_1`, `chain1_1` and `all_1` of one token of each answer, `all_4` and
`all_9` of all that a round of 3 or 8 drafts verifies.

By itself it runs a checkpoint whose later chains' head is zero, and a 1B of four chains with random weights. Behind a
cache of noise attention turns at the least difference, and an int8 copy of chain 1 chooses as chain 1 does half the
time, where in real text it does almost always; so there acceptance is given: each draft is replaced, with that
probability by what plain steps have chosen, else by another token. And the checkpoint as it is, at 6,400 tokens.
`--model` and `--preset` name others: a preset's drafts are replaced as `--acceptance` says; a checkpoint keeps its own
weights and drafts. First, drafts must give the tokens of plain steps. All takes about four minutes; `--quick`, of the
checkpoint alone, half a minute.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from colm_kernels import native

from bench.decode.loaded import Models, Source
from bench.harness.contest import Bar, Case, Contest, Run, timed
from bench.harness.suite import Options, arguments, num_tokens, positive, run
from bench.harness.units import length
from bench.kernels.common import short
from colm import defaults
from colm.clock import MonotonicClock
from colm.errors import ColmError
from colm.events import Token
from colm.model import num_step_parameters
from colm.sampling import SamplingParams
from colm.scale import Changing, Scale
from decode_node.auto_scale import AutoScale
from decode_node.decode_loop import DecodeLoop
from decode_node.drafter import Drafting, StepTimes
from decode_node.first_steps import measured
from decode_node.page_line import PageLine
from decode_node.page_pool import PagePool
from decode_node.plan import MAX_DRAFT_TOKENS, PlanRow, StepPlan
from decode_node.prefix_cache import PagesWanted
from decode_node.running_answer import RunningAnswer
from decode_node.step_budget import StepBudget

PRESET: Final = "llama-3.2-1b-8-8-8-8-air"
MODEL: Final = Path("models/SmolLM2-135M-Instruct-9-3")
OFF_OF_PLAIN: Final = 0.97
"""Of a plain node's tokens a second, for one that may draft and is not asked to; what is less can be measured."""
OFF_TOKENS, OFF_TURNS = 8, 16
"""Tokens of a turn without drafts, and turns of a round."""


@dataclass(frozen=True, kw_only=True)
class DraftCase(Case):
    """One model, batch and acceptance."""

    source: Source
    acceptance: float | None = None
    """Probability that a draft is what plain steps choose; None for drafts as they are."""
    wanted: float | None = None
    """Of plain steps' tokens a second."""
    batch_size: int = 1
    context_len: int = 512
    new_tokens: int = 96
    max_draft_tokens: int = defaults.MAX_DRAFT_TOKENS
    dtype: torch.dtype = torch.bfloat16
    models: Models = field(default_factory=Models, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.models.expect(self.source, self.num_tokens, self.batch_size)

    @property
    def num_tokens(self) -> int:
        """Of an answer in the cache, at its end."""
        return self.context_len + self.new_tokens

    @property
    def name(self) -> str:
        """The chains, the acceptance where it is given, the batch and the context."""
        chains = "-".join(map(str, self.source.config.chains))
        how = "agree" if self.source.has_agreeing_chains else "own"
        if self.acceptance is not None:
            how = f"a{self.acceptance:g}"
        return f"draft_{chains}_{how}_b{self.batch_size}_{length(self.context_len)}"

    @property
    def shape(self) -> dict[str, Any]:
        """The model's, and the answers'."""
        return self.source.config.to_dict() | {
            "model": self.source.label,
            "has_agreeing_chains": self.source.has_agreeing_chains,
            "acceptance": self.acceptance,
            "batch_size": self.batch_size,
            "context_len": self.context_len,
            "new_tokens": self.new_tokens,
            "max_draft_tokens": self.max_draft_tokens,
            "dtype": short(self.dtype),
        }

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """Answers without drafts and with them."""
        node, config = _Node(self, seed), self.source.config
        plain, drafts = _Turn(node), _Turn(node, self.max_draft_tokens)
        first = _Turn(node, self.max_draft_tokens, is_first=True)
        node.right_token_ids = plain.token_ids()

        def check() -> None:
            assert drafts.token_ids() == node.right_token_ids, "drafts have changed the tokens"

        wanted = self.wanted
        yield Contest(
            check=check,
            contenders={"plain": plain, "drafts": drafts, "first": first} | node.steps(),
            ours="drafts",
            against=("plain",),
            compared_by="tokens_per_s",
            bars=[] if wanted is None else [Bar("drafts_of_plain", ["drafts"], over=["plain"], at_least=wanted)],
            facts={
                "chain1_weights_fraction": num_step_parameters(config, 1) / num_step_parameters(config),
                "draft_of_chain1_bytes_fraction": node.engine.draft_share,
            },
        )


class OffCase(DraftCase):
    """A node that may draft, for answers that do not ask for it."""

    @property
    def name(self) -> str:
        """As of those that draft."""
        return super().name.replace("draft_", "off_")

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """Short turns of both."""
        node = _Node(self, seed)
        plain, off = _Turn(node), _Turn(node, 0)

        def check() -> None:
            assert off.token_ids() == plain.token_ids(), "a node that may draft chose other tokens"

        yield Contest(
            check=check,
            contenders={"plain": plain, "off": off},
            ours="off",
            against=("plain",),
            compared_by="tokens_per_s",
            bars=[Bar("off_of_plain", ["off"], over=["plain"], at_least=OFF_OF_PLAIN)],
            turns_of_round=OFF_TURNS,
        )


class _Node:
    """An engine, and pages of noise for every answer."""

    def __init__(self, case: DraftCase, seed: int) -> None:
        self.case, self.seed = case, seed
        loaded = case.models.loaded(case.source, case.dtype)
        self.store, self.engine = loaded.store(), loaded.engine("drafting")
        self.pages_each = self.store.layout.pages(case.num_tokens)
        self.at_start = measured(self.engine, self.store, MonotonicClock(), drafts=True)
        self.right_token_ids: Sequence[Sequence[int]] = ()
        """Of each answer, from plain steps."""

    def steps(self) -> dict[str, Run]:
        """Steps of the weights that draft, of chain 1 and of all chains, and those that verify a round."""
        each, case = np.arange(self.pages_each, dtype=np.int32), self.case
        tables = [number * self.pages_each + each for number in range(case.batch_size)]

        def step(num_chains: int, num_tokens: int = 1, *, is_draft: bool = False) -> Run:
            row = partial(PlanRow, (1,) * num_tokens, case.context_len - 1, num_chains, num_logits=num_tokens)
            plan = StepPlan(tuple(row(table_M, is_draft=is_draft) for table_M in tables))
            return timed(partial(self.engine.step, plan))

        num_chains = case.source.config.num_chains
        of_one = {"draft_1": step(1, is_draft=True), "chain1_1": step(1)}
        sizes = sorted({1, 4, 1 + case.max_draft_tokens})
        return of_one | {f"all_{num_tokens}": step(num_chains, num_tokens) for num_tokens in sizes}


class _Judged(RunningAnswer):
    """Each of its drafts is right with a given probability."""

    acceptance: float
    right_token_ids: Sequence[int]
    rng: np.random.Generator

    def add_draft(self, token_id: int | ColmError) -> None:
        if isinstance(token_id, int):
            right = self.right_token_ids[self.num_new_tokens + self.num_drafts]
            token_id = right if self.rng.random() < self.acceptance else right ^ 1
        super().add_draft(token_id)


class _Turn:
    """A batch of answers, each time from the same cache; what steps take is remembered from turn to turn.

    Args:
        node: it runs on.
        max_draft_tokens: what answers ask for; None on a node that drafts nothing.
        is_first: nothing is remembered.
    """

    def __init__(self, node: _Node, max_draft_tokens: int | None = None, *, is_first: bool = False) -> None:
        self._node = node
        self._max_draft_tokens = max_draft_tokens
        self._is_first = is_first
        self._drafting = self._new_drafting()
        self._num_turns = 0

    def _new_drafting(self) -> Drafting | None:
        if self._max_draft_tokens is None:
            return None
        times = StepTimes.of(
            self._node.case.source.config,
            max_tokens=self._node.engine.max_exact_tokens,
            draft_share=self._node.engine.draft_share,
            at_start=self._node.at_start,
        )
        return Drafting(times, MAX_DRAFT_TOKENS)

    def __call__(self) -> Mapping[str, float]:
        """Tokens a second of all answers, and what became of drafts."""
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        answers, _ = asyncio.run(self._run())
        seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        num_new = sum(answer.num_new_tokens for answer in answers)
        seen = {"tokens_per_s": num_new / seconds, "token_cpu_s": cpu_s / num_new}
        if self._max_draft_tokens:
            # Of the answers' tokens; refused drafts come on top.
            seen["drafted_fraction"] = sum(answer.num_draft_tokens for answer in answers) / num_new
            seen["accepted_fraction"] = sum(answer.num_accepted_tokens for answer in answers) / num_new
        return seen

    def token_ids(self) -> list[list[int]]:
        """Of each answer."""
        return asyncio.run(self._run())[1]

    async def _run(self) -> tuple[list[RunningAnswer], list[list[int]]]:
        case, node = self._node.case, self._node
        if self._is_first:
            self._drafting = self._new_drafting()
        self._num_turns += 1
        page_line = PageLine(PagePool(node.store.num_pages), max_waiting=case.batch_size)
        times = self._drafting.times if self._drafting else None
        auto_scale = AutoScale([1] * case.source.config.num_chains)  # nobody leaves the scale to it
        most = node.engine.max_exact_tokens
        loop = DecodeLoop(
            node.engine,
            page_line,
            max_batch_size=case.batch_size,
            budget=StepBudget(step_tokens=most, max_tokens=most),
            auto_scale=auto_scale,
            times=times,
        )
        num_chains = case.source.config.num_chains
        scale = Changing(Scale(num_chains=num_chains, min_chains=num_chains))
        running = asyncio.create_task(loop.run())
        answers: list[RunningAnswer] = []

        async def tokens(number: int) -> list[int]:
            reservation = page_line.reserve_now(str(number), PagesWanted(num_pages=node.pages_each))
            assert reservation is not None
            pages = reservation.lease
            kind = RunningAnswer if case.acceptance is None else _Judged
            answer = kind(
                unread_token_ids=(1 + number,),
                position=case.context_len - 1,
                num_chains=num_chains,
                max_new_tokens=case.new_tokens,
                table_M=node.store.page_table(pages),
                sampling=SamplingParams(ignore_eos=True),
                stop_token_ids=(),
                text_stream=None,
                drafter=self._drafting.drafter(self._max_draft_tokens) if self._drafting else None,
            )
            if isinstance(answer, _Judged) and case.acceptance is not None and self._drafting is not None:
                answer.acceptance, answer.right_token_ids = case.acceptance, node.right_token_ids[number]
                answer.rng = np.random.default_rng((node.seed, self._num_turns, number))
            answers.append(answer)
            async with aclosing(loop.events(answer, pages, scale)) as events:
                found = [event.token_id async for event in events if isinstance(event, Token)]
            page_line.release(pages)
            return found

        found = await asyncio.gather(*map(tokens, range(case.batch_size)))
        running.cancel()
        await asyncio.wait([running])
        return answers, found


class DraftOptions(Options):
    """Of this benchmark."""

    model: list[Path]
    preset: str | None
    acceptance: list[float]
    batch: list[int]
    context: int
    new_tokens: int
    max_draft_tokens: int
    quick: bool


def suite(*, quick: bool) -> list[DraftCase]:
    """What is run where no model is named."""
    agreeing, own = Source(str(MODEL), has_agreeing_chains=True), Source(str(MODEL))
    large = Source(PRESET, is_preset=True, has_agreeing_chains=True)
    models = Models()
    cases = [
        DraftCase(source=agreeing, acceptance=1.0, wanted=1.15, models=models),
        # Where drafts cannot pay they must cost nothing: chain 1 reads as many keys and values as all chains do.
        DraftCase(source=own, context_len=6400, wanted=OFF_OF_PLAIN, models=models),
        OffCase(source=own, new_tokens=OFF_TOKENS, models=models),
    ]
    if quick:
        return cases
    judged = [(1.0, 2.5), (0.7, 1.7), (0.2, None)]
    return [
        *cases,
        *(DraftCase(source=large, acceptance=a, wanted=wanted, models=models) for a, wanted in judged),
        OffCase(source=large, new_tokens=OFF_TOKENS, models=models),
    ]


def named(options: DraftOptions) -> list[DraftCase]:
    """The preset at every acceptance, then the checkpoints as they are; every batch."""
    preset = Source(options.preset, is_preset=True, has_agreeing_chains=True) if options.preset else None
    sources: list[tuple[Source, float | None]] = []
    if preset is not None:
        sources = [(preset, acceptance) for acceptance in options.acceptance]
    models = Models()
    return [
        DraftCase(
            source=source,
            acceptance=acceptance,
            batch_size=batch_size,
            context_len=options.context,
            new_tokens=options.new_tokens,
            max_draft_tokens=min(options.max_draft_tokens, MAX_DRAFT_TOKENS),
            models=models,
        )
        for source, acceptance in [*sources, *((Source(str(model)), None) for model in options.model)]
        for batch_size in options.batch
    ]


def main() -> None:
    """The suite, or the models that are named."""
    parser = arguments("bench.draft", __doc__, rounds=3)
    parser.add_argument("--model", type=Path, nargs="*", default=[], help="checkpoints' directories")
    parser.add_argument("--preset", help=f"a model of random weights, e.g. {PRESET}")
    parser.add_argument("--acceptance", type=float, nargs="*", default=[1.0, 0.7, 0.2], help="of the preset's drafts")
    parser.add_argument("--batch", type=positive, nargs="*", default=[1], help="answers at once; 1")
    parser.add_argument("--context", type=num_tokens, default=512, help="tokens in the cache at first; 512")
    parser.add_argument("--new-tokens", type=positive, default=96, help="of each answer; 96")
    parser.add_argument(
        "--max-draft-tokens",
        type=positive,
        default=defaults.MAX_DRAFT_TOKENS,
        help=f"of a round, at most {MAX_DRAFT_TOKENS}; a node's default, {defaults.MAX_DRAFT_TOKENS}",
    )
    parser.add_argument("--quick", action="store_true", help="where no model is named: no large model, 1 round")
    options = parser.parse_args(namespace=DraftOptions())
    if options.quick:
        options.rounds = 1
    cases = named(options) if options.model or options.preset else suite(quick=options.quick)
    run(cases, options, variants=native.available_variants())


if __name__ == "__main__":
    main()
