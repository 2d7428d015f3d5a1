"""Steps of one scale, context and batch, in several ways, beside plain reading."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from colm_kernels.decode_step import DecodeStep

from bench.decode.loaded import Models, Source, Way
from bench.harness.contest import Bar, Case, Contest, Run, timed
from bench.harness.units import length
from bench.kernels.common import read_ceiling, short
from bench.prefill.parts import PARTS, Parts, parts_timed
from colm.model.embedding import ChainTable
from decode_node import engine
from decode_node.kv_store import KvStore

WANTED_OF_READING: Final = 0.6
"""Of the rate of reading, for a step of one answer with weights as stored."""

DECODE_PARTS: Final[Parts] = {
    **{part: PARTS[part] for part in ("norms", "qkv", "ffn", "output")},
    "rotation": (*PARTS["rotation"][:2], (KvStore, "write_tokens")),
    "attention": ((engine, "decode_attention"),),
    "layers": ((DecodeStep, "run"),),
    "logits": ((ChainTable, "logits"),),
}
"""By part, the functions that are timed. `layers` are all of them in one call."""


@dataclass(frozen=True, kw_only=True)
class DecodeCase(Case):
    """One token a step of each of some answers."""

    source: Source
    num_chains: int
    context_len: int
    num_answers: int = 1
    dtype: torch.dtype = torch.bfloat16
    ways: tuple[Way, ...] = ("one_call", "modules")
    profile: bool = False
    models: Models = field(default_factory=Models, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.models.expect(self.source, self.context_len, self.num_answers)

    @property
    def name(self) -> str:
        """The scale, the context, and how many answers where not one; a preset's name before it."""
        model = f"{self.source.label}_" if self.source.is_preset else ""
        answers = f"_r{self.num_answers}" if self.num_answers > 1 else ""
        return f"decode_{model}{short(self.dtype)}_scale{self.num_chains}_{length(self.context_len)}{answers}"

    @property
    def shape(self) -> dict[str, Any]:
        """The model's, and the step's."""
        step = {"num_chains": self.num_chains, "context_len": self.context_len, "num_answers": self.num_answers}
        return self.source.config.to_dict() | step | {"dtype": short(self.dtype), "model": self.source.label}

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:  # noqa: ARG002 - the models of a run share their noise
        """Every way of running the step over pages of noise, and plain reading."""
        loaded = self.models.loaded(self.source, self.dtype)
        plan = loaded.plan(self.num_chains, self.context_len, self.num_answers)
        steps = {way: partial(loaded.engine(way).step, plan) for way in self.ways}

        def check() -> None:
            logits = {way: step() for way, step in steps.items()}
            assert all(each.isfinite().all() for each in logits.values()), "logits that are not finite"
            if {"one_call", "modules"} <= set(logits):
                assert torch.equal(logits["one_call"], logits["modules"]), "one call and modules differ"

        def turn(way: Way) -> Run:
            kv_bytes = self.num_answers * self.context_len * loaded.token_bytes(way)
            num_bytes = loaded.engine(way).weight_bytes(self.num_chains) + kv_bytes
            return (_profiled if self.profile else step_timed)(steps[way], num_bytes, self.num_answers)

        bar = Bar("of_reading", ["one_call"], over=["read"], at_least=WANTED_OF_READING)
        yield Contest(
            check=check,
            contenders={**{way: turn(way) for way in self.ways}, "read": with_cpu(read_ceiling())},
            ours="one_call",
            against=[*(["modules"] if "modules" in self.ways else []), "read"],
            compared_by="gb_per_s",
            bars=[bar] if self.num_answers == 1 else [],
        )


def step_timed(step: Callable[[], object], num_bytes: int, num_answers: int) -> Run:
    """A turn that counts what a step reads once, weights, keys and values, and the tokens that it gives."""
    return with_cpu(timed(step, gb=num_bytes / 1e9, tokens=num_answers))


def with_cpu(seen: Run) -> Run:
    """A turn that also says what it took of the CPU, which on a busy machine is the steadier number."""

    def turn() -> Mapping[str, float]:
        began_s = time.process_time()
        metrics = seen()
        return {**metrics, "cpu_s": time.process_time() - began_s}

    return turn


def _profiled(step: Callable[[], object], num_bytes: int, num_answers: int) -> Run:
    """Seconds of each part, and of the rest: plans, tables and, of modules, the loop over layers."""
    seen = step_timed(step, num_bytes, num_answers)

    def turn() -> Mapping[str, float]:
        with parts_timed(DECODE_PARTS) as seconds:
            metrics = seen()
        rest_s = metrics["s"] - sum(seconds.values())
        return {**metrics, **{f"{part}_s": each for part, each in seconds.items() if each}, "rest_s": rest_s}

    return turn
