"""The text: English prose that comes with Python, and facts planted in it.

Shapes: N tokens.
"""

import hashlib
import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pydoc_data.topics import topics
from typing import Self

import numpy as np
from numpy.typing import NDArray

PLACES = (
    *("Lisbon", "Oslo", "Cairo", "Lima", "Quebec", "Nairobi", "Vienna", "Jakarta", "Dublin", "Havana"),
    *("Athens", "Warsaw", "Manila", "Boston", "Zurich", "Kyoto", "Dakar", "Riga", "Bogota", "Sydney"),
)
NUMBER_DIGITS = 3

Encode = Callable[[str], NDArray[np.int64]]


def paragraphs() -> list[str]:
    """Paragraphs of Python's language reference, as `pydoc_data.topics` has them, each once.

    Topics repeat one another's paragraphs; what a text repeats is easy to predict from far away.
    """
    every = (part for topic in topics.values() for part in topic.strip().split("\n\n"))
    return list(dict.fromkeys(part for part in every if part.strip()))


@dataclass(frozen=True, slots=True)
class Corpus:
    """A long text as tokens, which may be cut between paragraphs."""

    token_ids_N: NDArray[np.int64]
    ends: tuple[int, ...]
    """Tokens up to the end of each paragraph."""
    sha256: str
    """Of the text."""

    @classmethod
    def of(cls, parts: Sequence[str], encode: Encode) -> Self:
        """Tokens of paragraphs, encoded one by one."""
        pieces = [encode(part + "\n\n") for part in parts]
        digest = hashlib.sha256("\n\n".join(parts).encode()).hexdigest()
        return cls(np.concatenate(pieces), tuple(accumulate(map(len, pieces))), digest)


@dataclass(frozen=True, slots=True)
class Fact:
    """What the rest of the text does not tell."""

    place: str
    number: str

    @property
    def sentence(self) -> str:
        """As a paragraph of its own, which says it twice: said once, it is too hard for a model of 135M parameters."""
        said = f"he secret number of {self.place} is {self.number}."
        return f"Remember this: t{said} T{said}\n\n"

    @property
    def question(self) -> str:
        """What a model goes on from; the answer is ` ` and the number."""
        return f"\n\nRemember this: the secret number of {self.place} is"


def facts(count: int, seed: int) -> list[Fact]:
    """Different places with different random numbers.

    Raises:
        ValueError: there are not so many places.
    """
    if not 1 <= count <= len(PLACES):
        raise ValueError(f"count={count} facts must be between 1 and {len(PLACES)}")
    drawn = random.Random(seed)
    numbers = drawn.sample(range(10 ** (NUMBER_DIGITS - 1), 10**NUMBER_DIGITS), count)
    return [Fact(place, str(number)) for place, number in zip(drawn.sample(PLACES, count), numbers, strict=True)]


@dataclass(frozen=True, slots=True)
class Exam:
    """A text to be prefilled, with facts in it, and how the real text goes on."""

    prompt_N: NDArray[np.int64]
    continuation_N: NDArray[np.int64]
    starts: tuple[int, ...]
    """Where each fact begins in the prompt."""


def exam(
    corpus: Corpus, planted: Sequence[Fact], encode: Encode, *, end: int, num_tokens: int, num_continued: int
) -> Exam:
    """The `num_tokens` tokens before `end`, facts counted, of which the last `num_continued` follow the prompt.

    Facts stand between paragraphs, at those nearest to depths evenly spaced from 0 to 1 of the prompt. Only the
    beginning of the text gives way to them, so texts of all lengths end alike.

    Raises:
        ValueError: the corpus has no such text, or no paragraph ends in it.
    """
    sentences = [encode(fact.sentence) for fact in planted]
    stop = end - num_continued
    start = stop - (num_tokens - num_continued - sum(map(len, sentences)))
    if not 0 <= start < stop < end <= len(corpus.token_ids_N):
        raise ValueError(
            f"num_tokens={num_tokens} up to {end} with {len(planted)} facts is no part of {len(corpus.token_ids_N)}"
        )
    inside = [each for each in corpus.ends if start <= each <= stop]
    if not inside:
        raise ValueError(f"no paragraph ends between tokens {start} and {stop}")
    depths = [i / max(1, len(planted) - 1) for i in range(len(planted))]
    cuts = [_nearest(inside, start + depth * (stop - start)) for depth in depths]
    pieces, starts, length = [corpus.token_ids_N[start : cuts[0]]], [], cuts[0] - start
    for sentence, (cut, next_cut) in zip(sentences, pairwise([*cuts, stop]), strict=True):
        starts.append(length)
        pieces += [sentence, corpus.token_ids_N[cut:next_cut]]
        length += len(sentence) + next_cut - cut
    return Exam(np.concatenate(pieces), corpus.token_ids_N[stop:end], tuple(starts))


def _nearest(ascending: Sequence[int], wanted: float) -> int:
    place = bisect_left(ascending, wanted)
    return min(ascending[max(0, place - 1) : place + 1], key=lambda each: abs(each - wanted))
