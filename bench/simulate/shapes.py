"""Lengths and arrivals of published traces, as figures; no line of a trace is here.

Quantiles were taken of the published files at the commits that `source` names: the smallest length that so many in 100
requests do not exceed. Between two of them, lengths are drawn log-uniformly, so a drawn distribution has these
quantiles. Prompts and answers are drawn independently: their rank correlations in the traces are below 0.08, but for
`mooncake-synthetic`, whose is -0.5. Traces share prefixes; here prompts share nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bench.simulate.workload import Rng

PERCENTS: Final = (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 99.9, 100)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Lengths by their quantiles, at `PERCENTS`."""

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(PERCENTS) or sorted(self.tokens) != [*self.tokens] or self.tokens[0] < 1:
            raise ValueError(f"{self.tokens} are no quantiles at {PERCENTS}: so many lengths from 1 on, ascending")

    def draw(self, count: int, rng: Rng) -> NDArray[np.int64]:
        """So many lengths."""
        logs = np.interp(100 * rng.random(count), PERCENTS, np.log(self.tokens))
        return np.rint(np.exp(logs)).astype(np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What a trace's requests are like."""

    prompts: Quantiles
    answers: Quantiles
    rate_per_s: float
    """Of the trace itself, on average."""
    mean_prompt_tokens: float
    """Of the trace, to hold drawn lengths against."""
    mean_answer_tokens: float
    source: str


_AZURE: Final = (
    "Azure LLM inference trace 2023 (github.com/Azure/AzurePublicDataset, CC-BY, data/AzureLLMInferenceTrace_{}.csv at "
    "7909210); Patel et al., Splitwise, ISCA 2024"
)
_MOONCAKE: Final = (
    "Mooncake (github.com/kvcache-ai/Mooncake, Apache-2.0, FAST25-release/traces/{}_trace.jsonl at 3cca71d); "
    "Qin et al., Mooncake, FAST 2025"
)

SHAPES: Final[Mapping[str, Shape]] = {
    "azure-code": Shape(
        prompts=Quantiles((3, 17, 75, 147, 385, 770, 1075, 1469, 1909, 2433, 3193, 5194, 7315, 7436, 7437, 7437)),
        answers=Quantiles((6, 6, 6, 7, 8, 9, 11, 13, 16, 20, 29, 55, 90, 252, 831, 1899)),
        rate_per_s=2.57,
        mean_prompt_tokens=2047.8,
        mean_answer_tokens=27.9,
        source=_AZURE.format("code"),
    ),
    "azure-conversation": Shape(
        prompts=Quantiles((2, 29, 181, 207, 387, 403, 703, 1020, 1071, 1130, 1315, 2735, 4083, 4142, 6212, 14050)),
        answers=Quantiles((7, 16, 41, 54, 77, 91, 103, 129, 177, 384, 400, 424, 451, 601, 954, 1000)),
        rate_per_s=5.53,
        mean_prompt_tokens=1154.7,
        mean_answer_tokens=211.1,
        source=_AZURE.format("conv"),
    ),
    "mooncake-conversation": Shape(
        prompts=Quantiles(
            (891, 894, 901, 964, 1662, 3263, 4993, 6909, 9570, 13196, 17869, 27367, 39552, 85401, 121301, 126195)
        ),
        answers=Quantiles((1, 3, 10, 24, 100, 213, 291, 350, 399, 447, 504, 597, 698, 1120, 2000, 2000)),
        rate_per_s=3.40,
        mean_prompt_tokens=12035.1,
        mean_answer_tokens=342.6,
        source=_MOONCAKE.format("conversation"),
    ),
    "mooncake-synthetic": Shape(
        prompts=Quantiles(
            (13, 16, 22, 30, 88, 912, 4365, 11587, 16289, 19411, 28430, 38615, 49009, 66458, 191374, 191378)
        ),
        answers=Quantiles((1, 2, 2, 4, 8, 16, 32, 69, 126, 211, 289, 389, 519, 769, 825, 893)),
        rate_per_s=3.91,
        mean_prompt_tokens=15325.5,
        mean_answer_tokens=149.1,
        source=_MOONCAKE.format("synthetic"),
    ),
}
