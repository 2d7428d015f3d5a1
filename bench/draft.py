"""What drafts gain: `python -m bench.draft --model models/SmolLM2-135M-Instruct-9-3 --json`.

Answers at full scale through the decode loop, as a decode node runs it, from a cache that holds noise:

    plain     a node that drafts nothing (decode.max_draft_tokens = 0)
    off       a node that may draft, and answers that do not ask for it: must cost nothing
    drafts    chain 1 drafts as many tokens as pay, at most `--max-draft-tokens`

Beside them are the engine's own steps: `chain1_1` and `all_1` of one token of each answer, `chain1_9` and `all_9` of
all that a round of 8 drafts verifies. A verification computes chain 1's part anew; what `chain1_9` takes longer than
`chain1_1` is the most that keeping it could save.

The weights of a preset are random, and the head of its later chains is zero: all chains then choose what chain 1 chose.
`--acceptance` spoils that many of its drafts at random, so that a draft is accepted with that probability. A checkpoint
keeps its own weights. First, drafts must give the tokens of plain steps.
"""

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from colm_kernels import native
from torch import Tensor

from bench.harness.contest import Case, Contest, Run, timed
from bench.harness.suite import Options, arguments, num_tokens, positive, run
from bench.harness.units import length
from bench.kernels.common import short
from bench.random_weights import RandomCheckpoint, RandomWeights
from colm import defaults
from colm.checkpoint import Checkpoint
from colm.defaults import PAGE_TOKENS
from colm.errors import ColmError
from colm.events import Token
from colm.kv import KvFormat
from colm.model import num_step_parameters
from colm.model.config import ChainConfig
from colm.model.presets import preset
from colm.sampling import SamplingParams
from colm.scale import Changing, Scale
from decode_node.auto_scale import AutoScale
from decode_node.decode_loop import DecodeLoop
from decode_node.drafter import Drafting, StepTimes
from decode_node.engine import DecodeEngine
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from decode_node.page_line import PageLine
from decode_node.page_pool import PagePool
from decode_node.plan import MAX_DRAFT_TOKENS, PlanRow, StepPlan
from decode_node.prefix_cache import PagesWanted
from decode_node.running_answer import RunningAnswer
from decode_node.sampler import Choice
from decode_node.step_budget import StepBudget

PRESET = "llama-3.2-1b-8-8-8-8-air"


@dataclass(frozen=True, kw_only=True)
class DraftCase(Case):
    """One model, batch and acceptance."""

    model: Path | None
    """A checkpoint; None for the preset."""
    preset: str
    acceptance: float
    batch_size: int
    context_len: int
    new_tokens: int
    max_draft_tokens: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The chains, the acceptance, the batch and the context."""
        chains = "-".join(map(str, self.config.chains))
        return f"draft_{chains}_a{self.acceptance:g}_b{self.batch_size}_{length(self.context_len)}"

    @property
    def config(self) -> ChainConfig:
        """Of the model."""
        return preset(self.preset) if self.model is None else Checkpoint.open(self.model).config

    @property
    def shape(self) -> dict[str, Any]:
        """The model's, and the answers'."""
        return self.config.to_dict() | {
            "model": self.preset if self.model is None else self.model.name,
            "acceptance": self.acceptance,
            "batch_size": self.batch_size,
            "context_len": self.context_len,
            "new_tokens": self.new_tokens,
            "max_draft_tokens": self.max_draft_tokens,
            "dtype": short(self.dtype),
        }

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """Answers without drafts, on a node that could, and with them."""
        node, config = _Node(self, seed), self.config
        plain, off, drafts = _Turn(node), _Turn(node, 0), _Turn(node, self.max_draft_tokens)

        def check() -> None:
            assert drafts.token_ids() == plain.token_ids(), "drafts have changed the tokens"

        yield Contest(
            check=check,
            contenders={"plain": plain, "off": off, "drafts": drafts} | node.steps(),
            ours="drafts",
            against=("plain", "off"),
            compared_by="tokens_per_s",
            facts={"chain1_weights_fraction": num_step_parameters(config, 1) / num_step_parameters(config)},
        )


@dataclass(frozen=True, kw_only=True)
class _AgreeingChains(RandomWeights):
    """The later chains' head is zero."""

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, made anew."""
        tensors = super().tensors(names)
        for name, tensor in tensors.items():
            if name.startswith("head.") and name != "head.chain1":
                tensor.zero_()
        return tensors


class _Node:
    """An engine, and pages of noise for every answer."""

    def __init__(self, case: DraftCase, seed: int) -> None:
        config = case.config
        self.case, self.seed = case, seed
        layout = KvLayout(KvFormat.of(config, case.dtype), PAGE_TOKENS)
        self.pages_each = layout.pages(case.context_len + case.new_tokens)
        self.store = KvStore(layout, case.batch_size * self.pages_each)
        generator = torch.Generator().manual_seed(seed)
        for pages in (self.store.k_pages_LBPKD, self.store.v_pages_LBPKD):
            pages.normal_(generator=generator)
        checkpoint = Checkpoint.open(case.model) if case.model is not None else None
        if checkpoint is None:
            weights = _AgreeingChains(config=config, dtype=case.dtype, seed=seed)
            checkpoint = RandomCheckpoint.of(case.preset, weights)
        self.engine = DecodeEngine(checkpoint, self.store)

    def steps(self) -> dict[str, Run]:
        """Steps of chain 1 and of all chains, of one token an answer and of a whole round."""
        each, case = np.arange(self.pages_each, dtype=np.int32), self.case
        tables = [number * self.pages_each + each for number in range(case.batch_size)]

        def step(num_chains: int, num_tokens: int) -> Run:
            row = partial(PlanRow, (1,) * num_tokens, case.context_len - 1, num_chains, num_logits=num_tokens)
            return timed(partial(self.engine.step, StepPlan(tuple(row(table_M) for table_M in tables))))

        return {
            f"{name}_{num_tokens}": step(num_chains, num_tokens)
            for num_tokens in (1, 1 + case.max_draft_tokens)
            for name, num_chains in (("chain1", 1), ("all", case.config.num_chains))
        }


class _Spoilt(RunningAnswer):
    """Some of its drafts are wrong."""

    acceptance = 1.0
    rng: np.random.Generator

    def add_draft(self, outcome: Choice | ColmError) -> None:
        if isinstance(outcome, Choice) and self.rng.random() >= self.acceptance:
            outcome = Choice(outcome.token_id ^ 1, outcome.logprob, ())
        super().add_draft(outcome)


class _Turn:
    """A batch of answers, each time from the same cache; what steps take is remembered from turn to turn.

    Args:
        node: it runs on.
        max_draft_tokens: what answers ask for; None on a node that drafts nothing.
    """

    def __init__(self, node: _Node, max_draft_tokens: int | None = None) -> None:
        self._node = node
        self._drafting: Drafting | None = None
        if max_draft_tokens is not None:
            times = StepTimes.of(node.case.config, max_tokens=node.engine.max_exact_tokens)
            self._drafting = Drafting(times, MAX_DRAFT_TOKENS)
        self._max_draft_tokens = max_draft_tokens
        self._num_turns = 0

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
        self._num_turns += 1
        page_line = PageLine(PagePool(node.store.num_pages), max_waiting=case.batch_size)
        times = self._drafting.times if self._drafting else None
        auto_scale = AutoScale([1] * case.config.num_chains)  # nobody leaves the scale to it
        most = node.engine.max_exact_tokens
        loop = DecodeLoop(
            node.engine,
            page_line,
            max_batch_size=case.batch_size,
            budget=StepBudget(step_tokens=most, max_tokens=most),
            auto_scale=auto_scale,
            times=times,
        )
        num_chains = case.config.num_chains
        scale = Changing(Scale(num_chains=num_chains, min_chains=num_chains))
        running = asyncio.create_task(loop.run())
        answers: list[RunningAnswer] = []

        async def tokens(number: int) -> list[int]:
            reservation = page_line.reserve_now(str(number), PagesWanted(num_pages=node.pages_each))
            assert reservation is not None
            pages = reservation.lease
            answer = _Spoilt(
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
            answer.acceptance = case.acceptance
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
    preset: str
    acceptance: list[float]
    batch: list[int]
    context: int
    new_tokens: int
    max_draft_tokens: int


def main() -> None:
    """The preset at every acceptance, then the checkpoints as they are; every batch."""
    parser = arguments("bench.draft", __doc__, rounds=5)
    parser.add_argument("--model", type=Path, nargs="*", default=[], help="checkpoints' directories")
    parser.add_argument("--preset", default=PRESET, help=f"a model of random weights; {PRESET}, none with ''")
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
    options = parser.parse_args(namespace=DraftOptions())
    case = partial(
        DraftCase,
        preset=options.preset,
        context_len=options.context,
        new_tokens=options.new_tokens,
        max_draft_tokens=min(options.max_draft_tokens, MAX_DRAFT_TOKENS),
        dtype=torch.bfloat16,
    )
    cases = [
        case(model=model, acceptance=acceptance, batch_size=batch_size)
        for model, acceptances in (
            (None, options.acceptance if options.preset else []),
            *((m, [1.0]) for m in options.model),
        )
        for acceptance in acceptances
        for batch_size in options.batch
    ]
    run(cases, options, variants=native.available_variants())


if __name__ == "__main__":
    main()
