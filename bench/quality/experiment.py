"""Runs one cell after the other on the nodes' own engines.

Shapes: N tokens of a prompt, X rows, H query heads, K kv heads, E head dim.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Self

import torch
from colm_kernels.steps import Steps
from torch import Tensor

from bench.quality.cells import DENSE, NUM_CONTINUED, Cell
from bench.quality.metrics import block_means
from bench.quality.reading import Reading
from bench.quality.text import Corpus, Encode, exam, facts
from colm.checkpoint import Checkpoint, backbone_digest
from colm.convert import Stretch
from colm.defaults import TILE_TOKENS
from colm.dtypes import dtype_name
from colm.kv import KvFormat
from prefill_node.engine import PrefillEngine
from prefill_node.sparse.plan import LayerPlan
from prefill_node.sparse.planner import ESTIMATION_ROWS, SparsePlanner
from prefill_node.sparse.prompt_plans import PromptPlans

NUM_SCORED, NUM_BLOCKS = 1000, 20
"""Last tokens of the continuation that count, and the blocks in which their figures are kept."""
STRETCH = Stretch(kind="yarn", factor=4.0)
TEXT_STRIDE = 32768
"""Texts end so far apart, from the corpus's end backwards, so that the longest do not overlap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a cell brought."""

    nll_blocks: tuple[float, ...]
    """Mean -ln p over blocks of the scored tokens, in order."""
    found: tuple[bool, ...]
    """Whether the answer about each fact is right, by depth."""
    density: float
    """Share of the causal pairs of the prompt that attention listed, over the layers that attend at the prefill."""
    num_dense_layers: int
    """Layers that attended to everything."""

    def as_json(self) -> dict[str, Any]:
        """For a record."""
        return asdict(self)

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Self:
        """What `as_json` gave."""
        return cls(**{**data, "nll_blocks": tuple(data["nll_blocks"]), "found": tuple(data["found"])})


class WatchedPlans(PromptPlans):
    """A prompt's plans, with or without audits, and how much they listed."""

    def __init__(self, planner: SparsePlanner, *, is_audited: bool) -> None:
        super().__init__(planner)
        self.densities: list[float] = []
        """Of each planned layer."""
        self._unaudited = None if is_audited else planner

    def plan(self, layer: int, queries_of: Callable[[Tensor], Tensor], k_KNE: Tensor) -> Steps[LayerPlan | None]:
        """As the engine asks for it."""
        if self._unaudited is None:
            plan = yield from super().plan(layer, queries_of, k_KNE)
        else:
            num_tokens = k_KNE.shape[1]
            q_RHE = queries_of(torch.arange(max(0, num_tokens - ESTIMATION_ROWS), num_tokens))
            plan = yield from self._unaudited.plan(layer, q_RHE, k_KNE)
            if plan is not None and plan.density() > self._unaudited.policy.max_density:
                plan = None
        self.densities.append(1.0 if plan is None else plan.density())
        return plan


class Experiment:
    """A model and a corpus, from which cells are made.

    Args:
        checkpoint: the model as it was trained.
        corpus: the text.
        encode: the model's tokenizer.
        dtype: of weights, keys and values.
        seed: of the facts.
        num_facts: in each prompt.
    """

    def __init__(
        self, checkpoint: Checkpoint, corpus: Corpus, encode: Encode, *, dtype: torch.dtype, seed: int, num_facts: int
    ) -> None:
        self._checkpoint = checkpoint
        self._corpus = corpus
        self._encode = encode
        self._format = KvFormat.of(checkpoint.config, dtype)
        self._seed = seed
        self._num_facts = num_facts
        self._engine = cache(self._engine_of)

    @property
    def setting(self) -> dict[str, Any]:
        """What all cells have in common: records of another setting are of another experiment."""
        return {
            "model": self._checkpoint.path.name,
            "backbone_sha256": backbone_digest(self._checkpoint),
            "text_sha256": self._corpus.sha256,
            "dtype": dtype_name(self._format.dtype),
            "seed": self._seed,
            "num_facts": self._num_facts,
            "num_scored": NUM_SCORED,
        }

    def run(self, cell: Cell) -> Outcome:
        """Prefill a prompt, then read its continuation, then ask for each fact.

        Raises:
            ValueError: the corpus has no such text.
        """
        planted = facts(self._num_facts, self._seed + cell.text)
        paper = exam(
            self._corpus,
            planted,
            self._encode,
            end=len(self._corpus.token_ids_N) - cell.text * TEXT_STRIDE,
            num_tokens=cell.num_tokens,
            num_continued=NUM_CONTINUED,
        )
        checkpoint, engine = self._stretched(cell.is_stretched), self._engine(cell.is_stretched)
        reading = Reading(
            checkpoint,
            self._format,
            num_tokens=len(paper.prompt_N),
            max_text_tokens=NUM_CONTINUED,
        )
        plans = self._plans(cell)
        for tile in engine.run(paper.prompt_N, sparse=plans):
            if tile.num_tokens:
                reading.write(tile)
        nlls = reading.nlls(paper.continuation_N)[-NUM_SCORED:].tolist()
        asked = [(self._encode(fact.question), self._encode(f" {fact.number}")) for fact in planted]
        densities: Sequence[float] = (1.0,) if plans is None else plans.densities
        num_layers = self._format.num_layers - 1
        return Outcome(
            nll_blocks=tuple(round(each, 6) for each in block_means(nlls, NUM_BLOCKS)),
            found=tuple(reading.is_answered(question_T, answer_T) for question_T, answer_T in asked),
            density=round(sum(densities) / len(densities), 4),
            num_dense_layers=num_layers if plans is None else sum(each == 1.0 for each in densities),
        )

    def _plans(self, cell: Cell) -> WatchedPlans | None:
        if cell.budget.kind == DENSE:
            return None
        return WatchedPlans(SparsePlanner(self._checkpoint.config, cell.budget.policy), is_audited=cell.is_audited)

    def _stretched(self, is_stretched: bool) -> Checkpoint:
        if not is_stretched:
            return self._checkpoint
        return replace(self._checkpoint, config=STRETCH.of(self._checkpoint.path, self._checkpoint.config))

    def _engine_of(self, is_stretched: bool) -> PrefillEngine:
        return PrefillEngine(self._stretched(is_stretched), self._format, tile_tokens=TILE_TOKENS)
