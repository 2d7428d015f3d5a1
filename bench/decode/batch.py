"""What a batch gains: tokens a second of some answers in one step, beside one answer's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch

from bench.decode.loaded import Models, Source
from bench.decode.step import step_timed
from bench.harness.contest import Bar, Case, Contest
from bench.harness.units import length
from bench.kernels.common import short

WANTED_OF_A_BATCH: Final = 8.0
"""Times one answer's tokens a second, for 16 answers."""


@dataclass(frozen=True, kw_only=True)
class BatchCase(Case):
    """Batches of several sizes at one scale and context, weights as stored."""

    source: Source
    num_chains: int
    context_len: int = 256
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    dtype: torch.dtype = torch.bfloat16
    models: Models = field(default_factory=Models, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.models.expect(self.source, self.context_len, max(self.batch_sizes))

    @property
    def name(self) -> str:
        """The scale and the context."""
        return f"batch_{short(self.dtype)}_scale{self.num_chains}_{length(self.context_len)}"

    @property
    def shape(self) -> dict[str, Any]:
        """The model's, and the steps'."""
        steps = {"num_chains": self.num_chains, "context_len": self.context_len, "batch_sizes": self.batch_sizes}
        return self.source.config.to_dict() | steps | {"dtype": short(self.dtype), "model": self.source.label}

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:  # noqa: ARG002 - the models of a run share their noise
        """Each batch in turn."""
        loaded = self.models.loaded(self.source, self.dtype)
        engine, token_bytes = loaded.engine("one_call"), loaded.token_bytes("one_call")
        plans = {size: loaded.plan(self.num_chains, self.context_len, size) for size in self.batch_sizes}
        steps = {size: partial(engine.step, plan) for size, plan in plans.items()}
        weights = engine.weight_bytes(self.num_chains)

        def check() -> None:
            assert all(step().isfinite().all() for step in steps.values()), "logits that are not finite"

        one, *_, most = names = [f"answers_{size}" for size in self.batch_sizes]
        yield Contest(
            check=check,
            contenders={
                name: step_timed(step, weights + size * self.context_len * token_bytes, size)
                for name, (size, step) in zip(names, steps.items(), strict=True)
            },
            ours=most,
            against=[one],
            compared_by="tokens_per_s",
            bars=[Bar("of_a_batch", [most], over=[one], at_least=WANTED_OF_A_BATCH)],
        )
