"""Costs of both engines of a small cluster that runs, as its clients see them, alone and beside each other.

One request after the other gives prompts' times by length; a few at once give a decode step's time by answers and
contexts; prompts beside answers say how much each slows the other down. All of it is seen by a client, through the
gateway, so the work of other processes on the same cores is in it. Everything is fitted to the form that
`prefill_node.cost_model` and `bench.simulate.costs` have, and nothing of it is seen under load.

Medians of a few rounds, not the best of them: users have what is usual.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import isnan, nan
from statistics import median
from time import perf_counter
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bench.serving.trace import Text
from bench.simulate.beside import Gaps, RunningAnswers
from bench.simulate.costs import DecodeWork
from bench.simulate.processor import Contention
from colm.client import AsyncClient
from colm.errors import ColmError
from colm.events import Token
from colm.model.config import ChainConfig
from colm.sampling import SamplingParams
from prefill_node.cost_model import CostModel, PrefillShape, Work

PROMPTS: Final = (65, 129, 257, 513, 1025)
"""Tokens; the last of each is the decode node's."""
ANSWERS: Final = (1, 3, 6)
"""At once."""
BESIDE: Final = (1, 3, 6)
"""Answers beside which prompts are computed."""
_PROMPTS_BESIDE: Final = (129, 513, 129, 513)
"""One after the other."""
_ANSWER_BESIDE_TOKENS: Final = 600
"""More than come before all those prompts are there; then the answers are given up."""
_ROUNDS: Final = 3
_STEADY_TOKENS: Final = 24
"""Of an answer, while all run; before that, each waits for the others' prompts."""
_WAIT_TOKENS: Final = 10
_GREEDY: Final = SamplingParams(ignore_eos=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredCosts:
    """`bench.simulate.costs.Costs` of one machine."""

    prefill: CostModel
    step_s: float
    """Of a decode step, whatever it has."""
    answer_s: float
    """For each of its tokens."""
    context_s: float
    """For each key that they attend to."""
    overhead_s: float
    """Of a request: what of its time to the first token neither engine takes."""
    contention: Contention

    def prefill_step_s(self, work: Work) -> float:
        """As fitted."""
        return self.prefill.seconds(work)

    def decode_step_s(self, work: DecodeWork) -> float:
        """As fitted."""
        num_tokens = sum(work.num_tokens.values())
        return self.step_s + self.answer_s * num_tokens + self.context_s * work.num_context_tokens

    def believed(self) -> CostModel:
        """The truth, to begin with."""
        return replace(self.prefill)


class Calibration:
    """Asks an idle cluster.

    Args:
        client: of its gateway.
        config: of the model.
        tile_tokens: of its prefill node.
        text: makes prompts that share nothing.
        seed: of these.
        now_s: clock of all times.
    """

    def __init__(
        self,
        client: AsyncClient,
        config: ChainConfig,
        *,
        tile_tokens: int,
        text: Text,
        seed: int,
        now_s: Callable[[], float] = perf_counter,
    ) -> None:
        self._client = client
        self._shape = PrefillShape.of(config, tile_tokens)
        self._text = text
        self._rng = np.random.default_rng(seed)
        self._now_s = now_s

    async def measure(self, tell: Callable[[str], None]) -> MeasuredCosts:
        """All costs."""
        await self._times(PROMPTS[-1], 2)  # what is used first is set up first
        tell("decode steps")
        seen: list[tuple[DecodeWork, float]] = []
        for num_answers, num_tokens in [*((each, PROMPTS[0]) for each in ANSWERS), (1, PROMPTS[-1])]:
            gap_s = median([await self._gap_s(num_answers, num_tokens) for _ in range(_ROUNDS)])
            contexts = num_answers * (num_tokens + _STEADY_TOKENS // 2)
            seen.append((DecodeWork(num_tokens={1: num_answers}, num_context_tokens=contexts), gap_s))
        step_s, answer_s, context_s = nonnegative_fit(
            [[1, work.num_tokens[1], work.num_context_tokens] for work, _ in seen], [gap_s for _, gap_s in seen]
        )
        tell("prompts")
        alone = MeasuredCosts(
            prefill=CostModel(shape=self._shape, linear_flop_s=0.0, attention_flop_s=0.0, step_s=0.0),
            step_s=step_s,
            answer_s=answer_s,
            context_s=context_s,
            overhead_s=0.0,
            contention=_NONE,
        )
        ttfts_s, works = [], []
        for num_tokens in PROMPTS:
            ttft_s = median([(await self._times(num_tokens, 1))[0] for _ in range(_ROUNDS)])
            ttfts_s.append(ttft_s - alone.decode_step_s(DecodeWork(num_tokens={1: 1}, num_context_tokens=num_tokens)))
            works.append(self._shape.work(num_tokens - 1))
        overhead_s, linear, attention, of_step_s = nonnegative_fit(
            [[1, each.linear_flops, each.attention_flops, each.num_steps] for each in works], ttfts_s
        )
        alone = replace(
            alone,
            prefill=CostModel(
                shape=self._shape, linear_flop_s=linear, attention_flop_s=attention, step_s=max(of_step_s, 1e-9)
            ),
            overhead_s=overhead_s,
        )
        tell("both at once")
        beside = [await self._beside(num_answers, alone) for num_answers in BESIDE]
        decode, prefill = (tuple(max(0.0, each - 1) for each in side) for side in zip(*beside, strict=True))
        return replace(alone, contention=Contention(BESIDE, decode, prefill))

    async def _times(
        self, num_tokens: int, num_new_tokens: int, on_token: Callable[[], None] = lambda: None
    ) -> list[float]:
        """Seconds from a request to each of its tokens."""
        began_s, times_s = self._now_s(), list[float]()
        events = self._client.generate(
            token_ids=self._text(num_tokens, self._rng), max_new_tokens=num_new_tokens, sampling=_GREEDY
        )
        async for event in events:
            if isinstance(event, Token):
                times_s.append(self._now_s() - began_s)
                on_token()
        return times_s

    async def _gap_s(self, num_answers: int, num_tokens: int) -> float:
        """Between tokens, while so many answers run and nothing else does."""
        num_running, seen = 0, list[list[float]]()

        async def one() -> None:
            nonlocal num_running
            times_s: list[float] = []

            def note() -> None:
                nonlocal num_running
                num_running += not times_s
                times_s.append(self._now_s() if num_running == num_answers else nan)

            # Those that come first wait for the last one's prompt, and have enough tokens for that.
            await self._times(num_tokens, _STEADY_TOKENS + _WAIT_TOKENS * num_answers, note)
            seen.append(times_s)
            num_running -= 1

        await asyncio.gather(*(one() for _ in range(num_answers)))
        steady = [Gaps.of([at_s for at_s in times_s if not isnan(at_s)]) for times_s in seen]
        if min(each.count for each in steady) < 1:
            raise ColmError(f"{num_answers} answers never ran at once; the machine is too busy to be measured")
        return max(each.mean_s for each in steady)

    async def _beside(self, num_answers: int, alone: MeasuredCosts) -> tuple[float, float]:
        """How many times as long as alone decode steps of so many answers take beside prompts, and prompts beside them.

        Alone and beside take turns: a machine that is slower for some seconds is so for both.
        """
        alone_s = await self._prompts_s()
        async with RunningAnswers(
            lambda note: self._times(PROMPTS[0], _ANSWER_BESIDE_TOKENS, note), num_answers, self._now_s
        ) as answers:
            await answers.make(_WAIT_TOKENS)
            between, beside, took_s = Gaps(), Gaps(), 0.0
            for num_tokens in _PROMPTS_BESIDE:
                began_s = self._now_s()
                await answers.make(_STEADY_TOKENS)
                between += answers.gaps(began_s, asked_s := self._now_s())
                (ttft_s,) = await self._times(num_tokens, 1)
                # Nothing is computed while the request is on its way. The prompt's own first step is beside no prefill,
                # and waits for the end of another one.
                beside += answers.gaps(asked_s + alone.overhead_s, asked_s + ttft_s - between.mean_s)
                took_s += ttft_s - 1.5 * between.mean_s - alone.overhead_s
        alone_s = (alone_s + await self._prompts_s()) / 2
        first_s = alone.decode_step_s(DecodeWork(num_tokens={1: 1}, num_context_tokens=PROMPTS[0]))
        alone_s -= len(_PROMPTS_BESIDE) * (first_s + alone.overhead_s)
        return beside.mean_s / between.mean_s, took_s / alone_s

    async def _prompts_s(self) -> float:
        """To the first tokens of all prompts that are asked beside answers, of each alone."""
        return sum([(await self._times(num_tokens, 1))[0] for num_tokens in _PROMPTS_BESIDE])


_NONE: Final = Contention((1,), (0.0,), (0.0,))


def nonnegative_fit(rows: Sequence[Sequence[float]], wanted: Sequence[float]) -> NDArray[np.float64]:
    """Least squares of relative errors, over factors none of which is negative: the best of all sets of columns.

    Example: rows [[1, 1], [1, 2]] and wanted [3, 5] give factors [1, 2].
    """
    matrix, target = np.asarray(rows, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    scale = np.abs(matrix).max(axis=0)
    matrix = matrix / scale / target[:, None]
    best, least = np.zeros(matrix.shape[1]), float(len(target))
    for count in range(1, matrix.shape[1] + 1):
        for columns in map(list, combinations(range(matrix.shape[1]), count)):
            found, *_ = np.linalg.lstsq(matrix[:, columns], np.ones(len(target)), rcond=None)
            error = float(((matrix[:, columns] @ found - 1) ** 2).sum())
            if (found >= 0).all() and error < least - 1e-12:
                best, least = np.zeros(matrix.shape[1]), error
                best[columns] = found
    best /= scale
    return best
