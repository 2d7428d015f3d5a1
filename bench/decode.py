"""How fast a decode step is beside plain reading: `python -m bench.decode models/SmolLM2-135M-Instruct-9-3 --json`.

One token a step of each of some answers, at every scale of a checkpoint: all layers in one call of the kernels'
library, as the decode node runs them, and the model's modules one by one; with `--weights`, also over quantised ones.
`gb_per_s` counts what a step reads once: the weights, and the answers' keys and values. `read` is a sum over
memory in the same rounds, which bounds a step; a bar says how near to it a step of one answer should be. First, both
ways must give the same logits. `--profile` shows where the time goes.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from colm_kernels import native
from colm_kernels.decode_step import DecodeStep
from colm_kernels.quantised import Quantisation

from bench.harness.contest import Bar, Case, Contest, Run, timed
from bench.harness.suite import Options, arguments, positive, run
from bench.harness.units import length
from bench.kernels.common import read_ceiling, short
from bench.prefill.parts import PARTS, Parts, parts_timed
from colm.checkpoint import Checkpoint
from colm.kv import KvFormat
from colm.model.embedding import ChainTable
from colm.model.weights import WeightLayout
from decode_node import engine
from decode_node.engine import DecodeEngine
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from decode_node.plan import PlanRow, StepPlan

PAGE_TOKENS = 64
WANTED_OF_READING = 0.6
"""Of the rate of reading, for a step of one answer with weights as stored."""

DECODE_PARTS: Parts = {
    **{part: PARTS[part] for part in ("norms", "qkv", "ffn", "output")},
    "rotation": (*PARTS["rotation"][:2], (KvStore, "write_tokens")),
    "attention": ((engine, "decode_attention"),),
    "layers": ((DecodeStep, "run"),),
    "logits": ((ChainTable, "logits"),),
}
"""By part, the functions that are timed. `layers` are all of them in one call."""


@dataclass(frozen=True, kw_only=True)
class DecodeCase(Case):
    """One scale of one model."""

    model: Path
    num_chains: int
    context_len: int
    num_answers: int = 1
    dtype: torch.dtype
    quantisations: tuple[Quantisation, ...] = ()
    profile: bool

    @property
    def name(self) -> str:
        """The scale, the context, and how many answers where not one."""
        answers = f"_r{self.num_answers}" if self.num_answers > 1 else ""
        return f"decode_{short(self.dtype)}_scale{self.num_chains}_{length(self.context_len)}{answers}"

    @property
    def shape(self) -> dict[str, Any]:
        """The model's, and the step's."""
        config = Checkpoint.open(self.model).config.to_dict()
        step = {"num_chains": self.num_chains, "context_len": self.context_len, "num_answers": self.num_answers}
        return config | step | {"dtype": short(self.dtype), "model": self.model.name}

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """Both ways of running a step, over pages of noise, and plain reading."""
        checkpoint = Checkpoint.open(self.model)
        config = checkpoint.config
        layout = KvLayout(KvFormat.of(config, self.dtype), PAGE_TOKENS)
        store = KvStore(layout, layout.pages(self.context_len) * self.num_answers)
        generator = torch.Generator().manual_seed(seed)
        for pages in (store.k_pages_LBPKD, store.v_pages_LBPKD):
            pages.normal_(generator=generator)
        tables = np.random.default_rng(seed).permutation(store.num_pages).astype(np.int32).reshape(self.num_answers, -1)
        plan = StepPlan(tuple(PlanRow((1,), self.context_len - 1, self.num_chains, table_M) for table_M in tables))
        engines = {
            name: DecodeEngine(checkpoint, store, in_one_call=in_one_call)
            for name, in_one_call in (("one_call", True), ("modules", False))
        }
        for quantisation in self.quantisations:
            weights = WeightLayout(dtype=self.dtype, quantisation=quantisation)
            engines[quantisation] = DecodeEngine(checkpoint, store, weights=weights)
        ways = {name: partial(engine.step, plan) for name, engine in engines.items()}

        def check() -> None:
            one_call, modules, *quantised = (step() for step in ways.values())
            assert all(logits.isfinite().all() for logits in (modules, *quantised)), "logits that are not finite"
            assert torch.equal(one_call, modules), "one call and modules differ"

        turn = _profiled if self.profile else _timed
        kv_bytes = self.num_answers * self.context_len * config.num_layers * layout.layer_token_bytes
        bar = Bar("of_reading", ["one_call"], over=["read"], at_least=WANTED_OF_READING)
        yield Contest(
            check=check,
            contenders={
                **{
                    name: turn(step, engines[name].weight_bytes(self.num_chains) + kv_bytes, self.num_answers)
                    for name, step in ways.items()
                },
                "read": _with_cpu(read_ceiling()),
            },
            ours="one_call",
            against=("modules", "read"),
            compared_by="gb_per_s",
            bars=[bar] if self.num_answers == 1 else [],
        )


def _timed(step: Callable[[], object], num_bytes: int, num_answers: int) -> Run:
    return _with_cpu(timed(step, gb=num_bytes / 1e9, tokens=num_answers))


def _with_cpu(seen: Run) -> Run:
    """A turn that also says what it took of the CPU, which on a busy machine is the steadier number."""

    def turn() -> Mapping[str, float]:
        began_s = time.process_time()
        metrics = seen()
        return {**metrics, "cpu_s": time.process_time() - began_s}

    return turn


def _profiled(step: Callable[[], object], num_bytes: int, num_answers: int) -> Run:
    """Seconds of each part, and of the rest: plans, tables and, of modules, the loop over layers."""
    seen = _timed(step, num_bytes, num_answers)

    def turn() -> Mapping[str, float]:
        with parts_timed(DECODE_PARTS) as seconds:
            metrics = seen()
        rest_s = metrics["s"] - sum(seconds.values())
        return {**metrics, **{f"{part}_s": each for part, each in seconds.items() if each}, "rest_s": rest_s}

    return turn


class DecodeOptions(Options):
    """Of this benchmark."""

    model: Path
    context: int
    answers: int
    weights: list[Quantisation]
    profile: bool


def main() -> None:
    """Every scale of one model."""
    parser = arguments("bench.decode", __doc__, rounds=20)
    parser.add_argument("model", type=Path, help="a checkpoint's directory")
    parser.add_argument("--context", type=positive, default=16, help="tokens in the cache, the step's included; 16")
    parser.add_argument("--answers", type=positive, default=1, help="of one token each in a step; 1")
    parser.add_argument(
        "--weights",
        nargs="+",
        choices=get_args(Quantisation),
        default=[],
        help="quantised, beside the stored ones",
    )
    parser.add_argument("--profile", action="store_true", help="add the time of each part")
    options = parser.parse_args(namespace=DecodeOptions())
    num_chains = Checkpoint.open(options.model).config.num_chains
    cases = [
        DecodeCase(
            model=options.model,
            num_chains=scale,
            context_len=options.context,
            num_answers=options.answers,
            quantisations=tuple(options.weights),
            dtype=torch.bfloat16,
            profile=options.profile,
        )
        for scale in range(1, num_chains + 1)
    ]
    run(cases, options, variants=native.available_variants())


if __name__ == "__main__":
    main()
