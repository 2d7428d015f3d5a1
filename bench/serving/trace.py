"""What is asked, and when: arrivals, lengths and shared prefixes, all of them from one seed.

Shapes: N tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from bench.quality.text import Corpus, paragraphs
from bench.serving.arrivals import MIN_BURSTINESS, gaps, in_words
from colm.checkpoint import Checkpoint
from colm.errors import ConfigError
from colm.text.tokenizer import Tokenizer

Pattern = Literal["poisson", "bursts"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)

Rng = np.random.Generator
Text = Callable[[int, Rng], NDArray[np.int64]]
"""Makes so many tokens of a text."""


class Strict(BaseModel):
    """What a record is made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LogNormal(Strict):
    """Lengths in tokens: log-normal, rounded, clipped to a range."""

    median: PositiveFloat
    sigma: float = Field(ge=0)
    """Of the logarithm; e^sigma is the factor from the median to what 84 in 100 do not exceed."""
    low: PositiveInt
    high: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}")
        return self

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `MEDIAN,SIGMA,LOW,HIGH`.

        Raises:
            ValueError: it is not that.
        """
        parts = text.split(",")
        if len(parts) != len(cls.model_fields):
            raise ValueError(f"{text!r} is not MEDIAN,SIGMA,LOW,HIGH, e.g. 256,0.9,32,2048")
        return cls.model_validate(dict(zip(cls.model_fields, parts, strict=True)))

    def draw(self, count: int, rng: Rng) -> NDArray[np.int64]:
        """So many lengths."""
        drawn = np.rint(self.median * np.exp(self.sigma * rng.standard_normal(count)))
        return np.clip(drawn, self.low, self.high).astype(np.int64)

    def __str__(self) -> str:
        return f"log-normal, median {self.median:g}, sigma {self.sigma:g}, clipped to {self.low:,} .. {self.high:,}"


class Load(Strict):
    """What a system is put under."""

    pattern: Pattern
    rate_per_s: PositiveFloat
    """Requests a second, on average over the window."""
    seconds: PositiveFloat
    """The window in which requests arrive; answers may end after it."""
    burst_size: PositiveInt
    """Requests that arrive in one moment, where the pattern is bursts."""
    burstiness: float = Field(default=1.0, ge=MIN_BURSTINESS, allow_inf_nan=False)
    """Of the moments at which requests arrive; 1 is a Poisson process."""
    documents: LogNormal
    """Prompt tokens."""
    answers: LogNormal
    """New tokens."""
    shared_fraction: float = Field(ge=0, le=1)
    """How many prompts begin with a shared prefix."""
    num_prefixes: PositiveInt
    prefix_tokens: PositiveInt
    """Of each shared prefix; a shorter prompt is a part of it."""

    @property
    def arrivals(self) -> str:
        """In words."""
        return in_words(self.pattern, self.burstiness)

    @property
    def num_together(self) -> int:
        """Requests that arrive in one moment."""
        return self.burst_size if self.pattern == "bursts" else 1

    @property
    def num_requests(self) -> int:
        """As many as the rate says, in whole bursts, at least one."""
        return self.num_together * max(1, round(self.rate_per_s * self.seconds / self.num_together))


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One request."""

    at_s: float
    """When it arrives, from the beginning of the window."""
    token_ids_N: NDArray[np.int64]
    max_new_tokens: int
    prefix: int | None
    """Which shared prefix it begins with."""


def arrivals(load: Load, rng: Rng) -> list[float]:
    """When requests arrive, ascending.

    The number is fixed, so that every system and round is offered the same rate, not one that varies by its root: the
    gaps from the window's beginning to its end, the one after the last arrival among them, are scaled to its length. Of
    a Poisson process this is its distribution given its number of points.
    """
    ends = np.cumsum(gaps(load.num_requests // load.num_together + 1, load.burstiness, rng))
    moments = load.seconds * (ends[:-1] / ends[-1])
    return [float(each) for each in np.repeat(moments, load.num_together)]


def trace(load: Load, text: Text, seed: Sequence[int]) -> list[Asked]:
    """The requests of a window, the same for the same seed."""
    rng = np.random.default_rng(seed)
    times, count = arrivals(load, rng), load.num_requests
    lengths, answers = load.documents.draw(count, rng), load.answers.draw(count, rng)
    prefixes = [text(load.prefix_tokens, rng) for _ in range(load.num_prefixes)]
    # A share of exactly this size, spread at random.
    is_shared = rng.permutation(count) < round(load.shared_fraction * count)
    asked = []
    for at_s, length, answer, shares in zip(times, lengths.tolist(), answers.tolist(), is_shared, strict=True):
        prefix = int(rng.integers(load.num_prefixes)) if shares else None
        begin_N = prefixes[prefix][:length] if prefix is not None else np.zeros(0, dtype=np.int64)
        token_ids_N = np.concatenate([begin_N, text(length - len(begin_N), rng)])
        asked.append(Asked(at_s=at_s, token_ids_N=token_ids_N, max_new_tokens=answer, prefix=prefix))
    return asked


def text_for(checkpoint: Checkpoint) -> Text:
    """Pieces of Python's language reference; of a model without a tokenizer, random tokens."""
    tokenizer = Tokenizer.load(checkpoint)
    if tokenizer is None:
        return lambda count, rng: rng.integers(0, checkpoint.config.vocab_size, count)
    corpus_N = Corpus.of(paragraphs(), tokenizer.encode).token_ids_N

    def cut(count: int, rng: Rng) -> NDArray[np.int64]:
        start = int(rng.integers(0, len(corpus_N) - count + 1))
        return corpus_N[start : start + count]

    return cut


def check_lengths(load: Load, checkpoint: Checkpoint) -> None:
    """Refuse lengths that no request of the model may have.

    Raises:
        ConfigError: says which option, and the way out.
    """
    longest, max_context = load.documents.high + load.answers.high, checkpoint.config.max_context
    if longest > max_context:
        raise ConfigError(
            f"--documents up to {load.documents.high} and --answers up to {load.answers.high} tokens make {longest}, "
            f"beyond the model's context of {max_context}; lower either one's HIGH"
        )
