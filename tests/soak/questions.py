"""What a soak asks: requests of every kind, each with the answer that it gets while nothing goes wrong."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from colm.client import Client
from colm.errors import CapacityExceeded, DeadlineExceeded, InvalidRequest, ModelReplaced, PeerUnavailable
from colm.events import Accepted, Event, Finished, Reconnecting, Token
from colm.nodes import ModelStatus
from colm.sampling import SamplingParams

TIMEOUT_S = 120.0
_LENGTHS = ((0.4, 2, 120), (0.4, 200, 1500), (0.2, 3000, 6000))
"""(share, fewest, most) tokens of a prompt: some the decode node reads itself, some are one tile, some are many."""
_SPARSE_FROM = 512
_IDS = range(3, 259)
"""Tokens of a prompt; every tokenizer here has these."""


class End(Enum):
    """How a request ended. The last two must not be."""

    RIGHT = "right"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"
    REPLACED = "replaced"
    WRONG = "wrong"
    LOST = "lost"


class Outcome(NamedTuple):
    """How a request ended, and what there is to say about it."""

    end: End
    why: str = ""
    revision: str = ""
    """Of the model whose answer came, where that is right."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request, and the ids of its answer once they are known."""

    number: int
    options: dict[str, Any]
    expected: dict[str, list[int]] = field(default_factory=dict)
    """Of each model, by its revision."""

    @property
    def num_prompt_tokens(self) -> int:
        """Of the prompt."""
        return len(self.options["token_ids"])

    def ask(self, client: Client, **options: Any) -> Iterator[Event]:
        """The answer's events."""
        return client.generate(**{"timeout_s": TIMEOUT_S, **self.options, **options})

    def judge(self, events: Iterable[Event]) -> Outcome:
        """How the request ends. What came of an answer must be right in any case, and all of it of one model.

        Of the model that accepted the request, unless its gateway was lost: another one may have made the answer anew.
        """
        got: list[int] = []
        num_finished, possible = 0, self.expected
        end, why = End.LOST, "neither an answer nor an error came"
        try:
            for event in events:
                if isinstance(event, Accepted):
                    possible = {name: ids for name, ids in self.expected.items() if name == event.revision}
                elif isinstance(event, Reconnecting):
                    possible = self.expected
                elif isinstance(event, Token):
                    got.append(event.token_id)
                num_finished += isinstance(event, Finished)
        except DeadlineExceeded as error:
            end, why = End.DEADLINE, str(error)
        except (CapacityExceeded, InvalidRequest) as error:
            end, why = End.REFUSED, str(error)
        except PeerUnavailable as error:
            end, why = End.UNAVAILABLE, str(error)
        except ModelReplaced as error:
            end, why = End.REPLACED, str(error)
        except Exception as error:  # noqa: BLE001 - whatever else comes is no answer and no error that a client knows
            end, why = End.LOST, f"{type(error).__name__}: {error}"
        else:
            if num_finished == 1:
                for revision, ids in possible.items():
                    if got == ids:
                        return Outcome(End.RIGHT, "", revision)
                end, why = End.WRONG, f"{got}, not of {possible}"
        if all(got != ids[: len(got)] for ids in possible.values()):
            end, why = End.WRONG, f"{got}, not of {possible}"
        return Outcome(end, why)


def questions(draw: random.Random, num_questions: int, model: ModelStatus) -> list[Question]:
    """Prompts of all lengths, greedy and sampled with a seed, at every scale, some with sparse attention."""
    return [_question(draw, number, model) for number in range(num_questions)]


def _question(draw: random.Random, number: int, model: ModelStatus) -> Question:
    ((_, least, most),) = draw.choices(_LENGTHS, [share for share, _, _ in _LENGTHS])
    num_tokens = min(draw.randint(least, most), model.max_context_tokens - 64)
    is_sampled, is_sparse = draw.random() < 0.5, num_tokens >= _SPARSE_FROM and draw.random() < 0.4
    sampling = SamplingParams(ignore_eos=True)
    if is_sampled:
        sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=draw.randrange(1 << 32), ignore_eos=True)
    return Question(
        number=number,
        options={
            "token_ids": draw.choices(_IDS, k=num_tokens),
            "num_chains": draw.randint(1, len(model.chains)),
            "max_new_tokens": draw.randint(1, 48),
            "sampling": sampling,
            "attention": "sparse" if is_sparse else "dense",
        },
    )
