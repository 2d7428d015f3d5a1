"""Time of one step's sampling: `python -m bench.sampler --json`.

`choose` runs against a sort of each row's whole vocabulary, the usual definition of a draw. Logits are either normal,
with tens of thousands of tokens in the nucleus of top_p, or peaked: probabilities fall like rank^-1.5, as a language
model's do, with hundreds. First, the tokens drawn must be among those that sorting keeps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from bench.harness.contest import Case, Contest, timed
from bench.harness.suite import Options, arguments, positive, run
from colm.sampling import SamplingParams
from decode_node.sampler import Sampler, choose

CHECKED_ROWS = 2
"""Rows whose tokens are checked against sorting."""
CHOICES = {
    "greedy": SamplingParams(),
    "top_k=50": SamplingParams(temperature=1.0, top_k=50),
    "top_p=0.95": SamplingParams(temperature=1.0, top_p=0.95),
    "temperature": SamplingParams(temperature=1.0),
}
Logits = Literal["normal", "falling"]


@dataclass(frozen=True, kw_only=True)
class SamplerCase(Case):
    """One step's tokens."""

    choice: str
    """A key of CHOICES."""
    logits: Logits
    num_rows: int
    vocab_size: int

    @property
    def name(self) -> str:
        """Its fields."""
        return f"{self.choice}_{self.logits}_r{self.num_rows}_v{self.vocab_size}"

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """Sorting and `choose` on the same logits."""
        generator = torch.Generator().manual_seed(seed)
        params = replace(CHOICES[self.choice], seed=seed)
        logits_RV = self._draw(generator)
        samplers = [Sampler(params) for _ in range(self.num_rows)]
        yield Contest(
            check=partial(check, params, logits_RV[:CHECKED_ROWS]),
            contenders={
                "sorting": timed(partial(sort_rows, params, logits_RV, generator)),
                "choose": timed(partial(choose, samplers, range(self.num_rows), logits_RV)),
            },
            ours="choose",
            against=("sorting",),
        )

    def _draw(self, generator: torch.Generator) -> Tensor:
        if self.logits == "normal":
            return 2 * torch.randn(self.num_rows, self.vocab_size, generator=generator)
        falling = -1.5 * torch.arange(1, self.vocab_size + 1).log()
        return torch.stack([falling[torch.randperm(len(falling), generator=generator)] for _ in range(self.num_rows)])


def by_sorting(params: SamplingParams, logits_V: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One row's token and the tokens that could have been drawn."""
    logprobs_V = logits_V.log_softmax(dim=0)
    if params.temperature == 0:
        token_id = logprobs_V.argmax()
        return token_id, token_id[None]
    ordered, ids = logprobs_V.sort(descending=True, stable=True)
    probabilities = (ordered[: params.top_k or None].double() / params.temperature).softmax(dim=0)
    before = probabilities.cumsum(dim=0) - probabilities
    probabilities = probabilities * (before < params.top_p)
    return ids[torch.multinomial(probabilities, 1, generator=generator)], ids[: int((probabilities > 0).sum())]


def sort_rows(params: SamplingParams, logits_RV: Tensor, generator: torch.Generator) -> list[int]:
    """A step's tokens, row by row."""
    return [int(by_sorting(params, row_V, generator)[0]) for row_V in logits_RV]


def check(params: SamplingParams, logits_RV: Tensor) -> None:
    """Check that the tokens drawn by `choose` are among those that sorting keeps.

    Raises:
        AssertionError: one is not.
    """
    for row_V in logits_RV:
        (choice,) = choose([Sampler(params)], [0], row_V[None])
        _, kept = by_sorting(params, row_V, torch.Generator())
        assert choice.token_id in kept, f"{params} drew a token that sorting does not keep"  # type: ignore[union-attr]


class SamplerOptions(Options):
    """Options of this benchmark."""

    vocab_size: int
    rows: list[int]


def main() -> None:
    """Run every choice, kind of logits and number of rows."""
    parser = arguments("bench.sampler", __doc__, rounds=7)
    parser.add_argument("--vocab-size", type=positive, default=128_000)
    parser.add_argument("--rows", type=positive, nargs="+", default=[1, 8, 32])
    options = parser.parse_args(namespace=SamplerOptions())
    cases = [
        SamplerCase(choice=choice, logits=logits, num_rows=num_rows, vocab_size=options.vocab_size)
        for logits in get_args(Logits)
        for choice in CHOICES
        for num_rows in options.rows
    ]
    run(cases, options)


if __name__ == "__main__":
    main()
