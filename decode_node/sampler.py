"""Chooses the next tokens of a step's requests from their logits.

A request's tokens depend, to the bit, on its own seed, parameters and logits alone: not on the other requests of a
step, and not on how its tokens are divided into steps. Only log probabilities are computed for all rows at once. NumPy
has a vectorised argmax and comparisons, PyTorch has not: 0.3 ms against 5.7 ms for the argmax of 32 rows of 128K (2
cores of an AMD Zen 4).

Shapes: Q rows of logits, one or more a request, V vocabulary, C candidates: the tokens that may still be drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from colm.errors import ColmError, NotFinite
from colm.sampling import SamplingParams

_BLOCK_TOKENS = 128
_MAX_SORTED = 1024


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token with its log probability under the model, before temperature, top-k and top-p."""

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]


class Sampler:
    """One request's sampling parameters and random numbers, one number for each token drawn."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def skip(self, num_tokens: int) -> None:
        """Pass over the random numbers of so many tokens, which were drawn elsewhere."""
        if self.params.temperature > 0:
            for _ in range(num_tokens):
                self.uniform()

    def uniform(self) -> float:
        """The next random number, above 0 and at most 1."""
        return 1.0 - float(torch.rand((), dtype=torch.float64, generator=self._generator))


def choose(samplers: Sequence[Sampler], logits_QV: Tensor) -> list[Choice | ColmError]:
    """Choose the token that follows each row.

    Args:
        samplers: one a row. All rows of a request have its one sampler, and come in the order of their tokens, so that
            it draws for them one after the other.
        logits_QV: of the model, on any device; the host reads them.

    Returns:
        One choice a row; an error where the logits are not finite.
    """
    logits_QV = logits_QV.cpu().float()
    finite_Q = logits_QV.amax(dim=1).isfinite().tolist()
    logprobs = logits_QV.log_softmax(dim=1).numpy()
    return [
        _choose(sampler, logits_V, logprobs_V)
        if finite
        else NotFinite("the model's logits are not finite; its weights or the dtype are at fault")
        for sampler, finite, logits_V, logprobs_V in zip(samplers, finite_Q, logits_QV.numpy(), logprobs, strict=True)
    ]


def _choose(sampler: Sampler, logits_V: NDArray[np.float32], logprobs_V: NDArray[np.float32]) -> Choice:
    params = sampler.params
    token_id = int(logits_V.argmax()) if params.temperature == 0 else _draw(sampler, logits_V)
    top_ids = _likeliest(logits_V, params.top_logprobs)
    top_logprobs = tuple(zip(top_ids.tolist(), logprobs_V[top_ids].tolist(), strict=True))
    return Choice(token_id, float(logprobs_V[token_id]), top_logprobs)


def _draw(sampler: Sampler, logits_V: NDArray[np.float32]) -> int:
    params = sampler.params
    ids_C = _likeliest(logits_V, params.top_k) if params.top_k else None
    logits_C = logits_V if ids_C is None else logits_V[ids_C]
    # From the likeliest down and in float64: no temperature above 0 makes this overflow into NaN.
    with np.errstate(over="ignore"):
        weights_C = np.exp((logits_C - logits_C.max().astype(np.float64)) / params.temperature)
    if params.top_p < 1.0:
        kept_C = _nucleus(logits_C, weights_C, params.top_p)
        ids_C = kept_C if ids_C is None else ids_C[kept_C]
        weights_C = weights_C[kept_C]
    mass_C = weights_C.cumsum()
    # The number drawn is above 0, so the first token at which the mass reaches it has a weight above 0. It is at most
    # the whole mass, so there is such a token.
    drawn = int(mass_C.searchsorted(sampler.uniform() * mass_C[-1]))
    return drawn if ids_C is None else int(ids_C[drawn])


def _likeliest(logits_V: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Ids of the likeliest tokens, likeliest first; of equals the lower id is first."""
    count = min(count, len(logits_V))
    if count == 0:
        return np.empty(0, dtype=np.int64)
    # `count` blocks have a maximum of at least the count-th largest maximum, so that many tokens reach it.
    block_tokens = max(1, min(_BLOCK_TOKENS, len(logits_V) // (2 * count)))
    maxima = logits_V[: len(logits_V) // block_tokens * block_tokens].reshape(-1, block_tokens).max(axis=1)
    ids_C = np.flatnonzero(logits_V >= np.partition(maxima, -count)[-count])
    return ids_C[_descending(logits_V[ids_C])[:count]]


def _nucleus(logits_C: NDArray[np.float32], weights_C: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Indices of the likeliest candidates, down to the one with which their weight reaches `top_p` of the whole.

    That one is searched for by halving the range of logits in which it lies; only the last few are sorted.
    """
    mass = float(weights_C.sum())
    needed = top_p * mass
    # What weighs less than its share of the excess is not needed: all such together weigh less than the excess.
    # Half of that share, as sums are rounded.
    open_C = np.flatnonzero(weights_C >= (mass - needed) / len(weights_C) / 2)
    taken: list[NDArray[np.int64]] = []
    while len(open_C) > _MAX_SORTED:
        logits = logits_C[open_C]
        above = logits > (logits.min() + logits.max()) / 2
        likelier = open_C[above]
        if len(likelier) == 0:  # all are equal, or nearly
            break
        mass = float(weights_C[likelier].sum())
        if mass >= needed:
            open_C = likelier
        else:
            taken.append(likelier)
            needed -= mass
            open_C = open_C[~above]
    open_C = open_C[_descending(logits_C[open_C])]
    num_needed = 1 + int(weights_C[open_C].cumsum().searchsorted(needed))
    return np.concatenate([*taken, open_C[:num_needed]])


def _descending(values: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.argsort(-values, kind="stable")
