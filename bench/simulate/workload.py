"""What is asked, and when: arrivals and lengths, from a seed."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from bench.serving.arrivals import gaps
from bench.simulate.requests import SimRequest

Pattern = Literal["poisson", "bursts", "steps"]
PATTERNS: Final[tuple[Pattern, ...]] = get_args(Pattern)

STEP: Final = 4.0
"""Of the rate, in the middle half of the requests of `steps`."""

Rng = np.random.Generator


class Lengths(Protocol):
    """Draws lengths in tokens: `bench.serving.trace.LogNormal`, `bench.simulate.shapes.Quantiles`."""

    def draw(self, count: int, rng: Rng) -> NDArray[np.int64]:
        """So many, each at least 1."""


@dataclass(frozen=True, slots=True)
class Always:
    """One length."""

    num_tokens: int

    def draw(self, count: int, rng: Rng) -> NDArray[np.int64]:  # noqa: ARG002 - `Lengths`
        """So many."""
        return np.full(count, self.num_tokens, dtype=np.int64)

    def __str__(self) -> str:
        return f"{self.num_tokens:,} tokens"


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Requests that are independent of each other.

    A Poisson process has exponential times between arrivals; another burstiness has others, as
    `bench.serving.arrivals` describes. With bursts, so many requests arrive in one moment, and the moments are such a
    process of the same rate of requests. With steps, the rate rises to `STEP` times as much and falls again.
    """

    rate_per_s: float
    num_requests: int
    prompts: Lengths
    answers: Lengths
    num_chains: int
    max_context: int
    """Longer prompts are cut, so that the answer has room; as a client would have to."""
    pattern: Pattern = "poisson"
    burst_size: int = 1
    burstiness: float = 1.0

    def requests(self, seed: int) -> Iterator[SimRequest]:
        """The requests, in the order of arrival; the same for the same seed."""
        rng = np.random.default_rng(seed)
        num_together = self.burst_size if self.pattern == "bursts" else 1
        count = self.num_requests
        gaps_s = num_together / self.rate_per_s * gaps(-(-count // num_together), self.burstiness, rng)
        if self.pattern == "steps":
            gaps_s[count // 4 : 3 * count // 4] /= STEP
        moments = [at_s for at_s in accumulate(gaps_s.tolist()) for _ in range(num_together)][:count]
        answers = np.minimum(self.answers.draw(count, rng), self.max_context - 1)
        prompts = np.minimum(self.prompts.draw(count, rng), self.max_context - answers)
        for number, (at_s, prompt, answer) in enumerate(zip(moments, prompts.tolist(), answers.tolist(), strict=True)):
            yield SimRequest(
                number=number, at_s=at_s, num_prompt_tokens=prompt, num_new_tokens=answer, num_chains=self.num_chains
            )
