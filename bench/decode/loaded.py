"""Models and pages of noise that the cases of this benchmark share.

Shapes: L layers, B pages of the pool, P tokens of a page, K kv heads, D head dim.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from colm_kernels.quantised import Quantisation
from torch import Tensor

from bench.peers.weights import RepeatedWeights
from bench.random_weights import RandomCheckpoint
from colm.checkpoint import Checkpoint, WeightSource
from colm.defaults import DRAFT_WEIGHTS, PAGE_TOKENS
from colm.kv import KvFormat
from colm.model.config import ChainConfig
from colm.model.presets import preset
from colm.model.weights import WeightLayout
from decode_node.engine import DecodeEngine
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from decode_node.plan import PlanRow, StepPlan
from decode_node.settings import KvCacheDtype

_NOISE: Final = 1 << 20

Way = Literal["one_call", "modules", "int8", "q4", "int8_pages", "drafting"]
"""How a step runs: all layers in one call or the model's modules one by one, with weights as stored; in one call with
quantised weights; in one call with weights as stored, over pages of int8, or but for drafts, as a node has them by
default."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    name: str
    """A checkpoint's directory, or a preset, whose weights are random."""
    is_preset: bool = False
    has_agreeing_chains: bool = False
    """The head of the later chains is zero: all of them then choose what chain 1 chose."""

    @property
    def checkpoint(self) -> Checkpoint:
        """Opened; a preset's is nowhere on disk, nor one whose weights are changed."""
        weights: WeightSource
        if self.is_preset:
            weights = RepeatedWeights(config=preset(self.name), dtype=torch.bfloat16, seed=0)
        else:
            weights = opened = Checkpoint.open(Path(self.name))
            if not self.has_agreeing_chains:
                return opened
        return RandomCheckpoint.of(self.name, _AgreeingChains(weights) if self.has_agreeing_chains else weights)

    @property
    def config(self) -> ChainConfig:
        """Of the model."""
        return preset(self.name) if self.is_preset else Checkpoint.open(Path(self.name)).config

    @property
    def label(self) -> str:
        """Without the folder."""
        return Path(self.name).name


@dataclass(frozen=True)
class _AgreeingChains:
    """Other weights, but that the head of the later chains is zero."""

    weights: WeightSource

    @property
    def config(self) -> ChainConfig:
        """Of the other weights."""
        return self.weights.config

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors."""
        tensors = self.weights.tensors(names)
        later = {name for name in tensors if name.startswith("head.") and name != "head.chain1"}
        return {name: torch.zeros_like(each) if name in later else each for name, each in tensors.items()}


class Loaded:
    """A model's engines, each loaded when it is first asked for, over as many pages as the largest case needs.

    Args:
        source: of the model.
        num_pages: of each pool.
        dtype: of weights, keys and values, where they are not quantised.
    """

    def __init__(self, source: Source, num_pages: int, dtype: torch.dtype) -> None:
        self._checkpoint = source.checkpoint
        self._num_pages = num_pages
        self._dtype = dtype
        self._stores: dict[KvCacheDtype, KvStore] = {}
        self._engines: dict[Way, DecodeEngine] = {}

    @cached_property
    def _page_ids(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return np.random.default_rng(0).permutation(self._num_pages).astype(np.int32)

    def engine(self, way: Way) -> DecodeEngine:
        """One that steps in such a way."""
        if way not in self._engines:
            quantisation: Quantisation | None = way if way in ("int8", "q4") else None
            store = self.store(_cache_dtype(way))
            layout = WeightLayout(dtype=self._dtype, quantisation=quantisation)
            self._engines[way] = DecodeEngine(
                self._checkpoint,
                store,
                in_one_call=way != "modules",
                weights=layout,
                draft_weights=DRAFT_WEIGHTS if way == "drafting" else None,
            )
        return self._engines[way]

    def token_bytes(self, way: Way) -> int:
        """Of a token's keys and values in all layers."""
        return (
            self._checkpoint.config.num_layers
            * self._layout("int8" if way == "int8_pages" else "model").layer_token_bytes
        )

    def plan(self, num_chains: int, context_len: int, num_answers: int) -> StepPlan:
        """A step of one token of each answer, in pages that lie anywhere."""
        each = -(-context_len // PAGE_TOKENS)
        tables = self._page_ids[: num_answers * each].reshape(num_answers, each)
        return StepPlan(tuple(PlanRow((1,), context_len - 1, num_chains, table_M) for table_M in tables))

    def _layout(self, cache_dtype: KvCacheDtype) -> KvLayout:
        return KvLayout(KvFormat.of(self._checkpoint.config, self._dtype), PAGE_TOKENS, cache_dtype)

    def store(self, cache_dtype: KvCacheDtype = "model") -> KvStore:
        """Pages of noise."""
        if cache_dtype not in self._stores:
            store = self._stores[cache_dtype] = KvStore(self._layout(cache_dtype), self._num_pages)
            for scales_LBPK in (store.k_scales_LBPK, store.v_scales_LBPK):
                if scales_LBPK is not None:
                    scales_LBPK.fill_(1 / 32)
            fill_with_noise(store.k_pages_LBPKD, store.v_pages_LBPKD)
        return self._stores[cache_dtype]


def _cache_dtype(way: Way) -> KvCacheDtype:
    return "int8" if way == "int8_pages" else "model"


def fill_with_noise(*pages: Tensor) -> None:
    """The same million numbers over and over: gigabytes of others take half a minute to make."""
    block = torch.randn(_NOISE, generator=torch.Generator().manual_seed(0))
    for each in pages:
        flat = each.view(-1)
        part = (block * 32).clamp(-127, 127).to(torch.int8) if each.dtype == torch.int8 else block.to(each.dtype)
        for start in range(0, len(flat), _NOISE):
            to = flat[start : start + _NOISE]
            to.copy_(part[: len(to)])


class Models:
    """Keeps the model that was asked for last; the one before it is let go of first, since both may not fit."""

    def __init__(self) -> None:
        self._last: tuple[Source, Loaded] | None = None
        self._num_pages: dict[Source, int] = {}

    def expect(self, source: Source, context_len: int, num_answers: int) -> None:
        """Say what a case will need, before the first one is loaded."""
        pages = num_answers * -(-context_len // PAGE_TOKENS)
        self._num_pages[source] = max(pages, self._num_pages.get(source, 0))

    def loaded(self, source: Source, dtype: torch.dtype) -> Loaded:
        """The model; every case of it was expected."""
        if self._last is None or self._last[0] != source:
            self._last = None
            self._last = source, Loaded(source, self._num_pages[source], dtype)
        return self._last[1]
