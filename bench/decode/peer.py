"""One answer at scale 1 beside llama.cpp, which steps over its own file of the same model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from bench.decode.loaded import Models, Source, Way
from bench.decode.step import step_timed
from bench.harness.contest import Bar, Case, Contest
from bench.harness.units import length
from bench.kernels.common import short
from bench.peers import PeerAbsent
from bench.peers.llama_cpp import open_gguf
from bench.peers.llama_cpp_steps import steps_of_gguf

WAYS: Final[tuple[Way, ...]] = ("one_call", "q4")
WANTED: Final[dict[int, Bar]] = {
    512: Bar("q4_of_llama_cpp", ["q4"], over=["llama_cpp"], at_least=1.0),
    6400: Bar("bf16_of_llama_cpp", ["one_call"], over=["llama_cpp"], at_least=1.3),
}
"""By context."""
_FEW_TOKENS: Final = 32


def why_absent(gguf: Path) -> str | None:
    """Why llama.cpp cannot read its file here, if so."""
    try:
        with open_gguf(gguf, _FEW_TOKENS):
            return None
    except PeerAbsent as err:
        return str(err)


@dataclass(frozen=True, kw_only=True)
class PeerCase(Case):
    """One context."""

    source: Source
    gguf: Path
    context_len: int
    dtype: torch.dtype = torch.bfloat16
    models: Models = field(default_factory=Models, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.models.expect(self.source, self.context_len, 1)

    @property
    def name(self) -> str:
        """The context."""
        return f"llama_cpp_{short(self.dtype)}_scale1_{length(self.context_len)}"

    @property
    def shape(self) -> dict[str, Any]:
        """The model's, and what the peer reads."""
        step = {"num_chains": 1, "context_len": self.context_len, "dtype": short(self.dtype)}
        return self.source.config.to_dict() | step | {"model": self.source.label, "gguf": self.gguf.name}

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """Weights as stored and in q4, and the peer's own types.

        Raises:
            PeerAbsent: it cannot read the file.
        """
        loaded = self.models.loaded(self.source, self.dtype)
        plan = loaded.plan(1, self.context_len, 1)
        steps = {way: partial(loaded.engine(way).step, plan) for way in WAYS}
        bytes_of = {
            way: loaded.engine(way).weight_bytes(1) + self.context_len * loaded.token_bytes(way) for way in WAYS
        }
        with steps_of_gguf(self.gguf, self.context_len, seed) as peer:

            def check() -> None:
                assert all(step().isfinite().all() for step in steps.values()), "logits that are not finite"

            yield Contest(
                check=check,
                contenders={
                    **{way: step_timed(steps[way], bytes_of[way], 1) for way in WAYS},
                    "llama_cpp": peer,
                },
                ours="one_call",
                against=["q4", "llama_cpp"],
                compared_by="tokens_per_s",
                bars=[WANTED[self.context_len]] if self.context_len in WANTED else [],
            )
