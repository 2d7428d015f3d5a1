"""Chooses the next tokens of a step's requests from their logits.

A request's tokens depend, to the bit, on its own seed, parameters, text and logits alone: not on the other requests of
a step, nor on how its tokens are divided into steps. Each position of its text has a random number of its own, whatever
was drawn before. So what chain 1 drafts is what all chains draw there, wherever their logits agree.

Only log probabilities are computed for all rows at once. NumPy has a vectorised argmax and comparisons, PyTorch has
not: 0.3 ms against 5.7 ms for the argmax of 32 rows of 128K (2 cores of an AMD Zen 4).

Shapes: Q rows of logits, one or more a request, V vocabulary, C candidates: the tokens that may still be drawn.
"""

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from colm.errors import ColmError, InvalidRequest, NotFinite
from colm.sampling import SamplingParams
from decode_node.constraint import ConstrainedText
from decode_node.penalties import Penalties

_BLOCK_TOKENS = 128
_MAX_SORTED = 1024


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token with its log probability under the model, before all that `SamplingParams` does to it."""

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]


class Sampler:
    """One request's sampling parameters, its random numbers, one for each position of its text, and what it has said.

    Args:
        first_position: of the answer in the text.
        prompt_token_ids: what the repetition penalty counts besides the answer.
        end_token_ids: what `min_tokens` rules out.
        draft_token_ids: behind the answer's tokens; its owner adds to them and clears them.
        constrained: what the answer may say; None for anything.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        first_position: int = 0,
        prompt_token_ids: Sequence[int] | NDArray[np.int64] = (),
        end_token_ids: Collection[int] = (),
        draft_token_ids: Sequence[int] = (),
        constrained: ConstrainedText | None = None,
    ) -> None:
        self.params = params
        self._next_position = first_position
        self._free_position = first_position + params.min_tokens
        self._end_token_ids = np.array(sorted(end_token_ids), dtype=np.int64)
        self._draft_token_ids = draft_token_ids
        self._penalties = Penalties.of(params, prompt_token_ids)
        self._constrained = constrained
        seed = secrets.randbits(64) if params.seed is None else params.seed
        self._key = seed.to_bytes(8, "little")

    def uniform(self, position: int) -> float:
        """The random number of the token at a position, above 0 and at most 1."""
        digest = blake2b(position.to_bytes(8, "little"), digest_size=8, key=self._key).digest()
        return 1.0 - (int.from_bytes(digest, "little") >> 11) * 2.0**-53

    def take(self, token_id: int) -> None:
        """Note the next token of the answer.

        Raises:
            InvalidRequest: no answer that is held to the constraint has it there.
        """
        self._next_position += 1
        if self._penalties is not None:
            self._penalties.take(token_id)
        if self._constrained is not None and token_id not in self._end_token_ids:
            self._constrained.take(token_id)

    @property
    def has_said_all(self) -> bool:
        """Whether the constraint lets nothing follow."""
        return self._constrained is not None and self._constrained.has_ended

    def edited(self, position: int, logits_V: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits from which the token at a position is chosen, behind the answer and the drafts before it."""
        if self._penalties is None:
            return logits_V
        return self._penalties.edited(logits_V, self._drafts_before(position))

    def allowed(self, position: int, vocab_size: int) -> NDArray[np.int64] | None:
        """Ids of the tokens that may be chosen at a position; None for all.

        Raises:
            InvalidRequest: the constraint takes too much, or cannot be followed with this vocabulary.
        """
        must_go_on = position < self._free_position and len(self._end_token_ids) > 0
        if self._constrained is None and not must_go_on:
            return None
        ends = self._end_token_ids[self._end_token_ids < vocab_size]
        allowed_V, may_end = np.ones(vocab_size, dtype=bool), False
        if self._constrained is not None:
            allowed_V, may_end = self._constrained.allowed(self._drafts_before(position))
            allowed_V = allowed_V.copy()
        if must_go_on:
            longer_V = allowed_V.copy()
            longer_V[ends] = False
            if longer_V.any():
                return np.flatnonzero(longer_V)
        if may_end:
            allowed_V[ends] = True
        return np.flatnonzero(allowed_V) if allowed_V.any() else None

    def _drafts_before(self, position: int) -> Sequence[int]:
        return self._draft_token_ids[: position - self._next_position]


def choose(samplers: Sequence[Sampler], positions_Q: Sequence[int], logits_QV: Tensor) -> list[Choice | ColmError]:
    """Choose the token that follows each row.

    Args:
        samplers: one a row; all rows of a request have its one sampler.
        positions_Q: where in its text, from 0, the token is that is chosen.
        logits_QV: of the model, on any device; the host reads them.

    Returns:
        One choice a row; an error where the logits are not finite.
    """
    logits_QV = logits_QV.cpu().float()
    logprobs_QV = logits_QV.log_softmax(dim=1).numpy()
    chosen_Q = choose_ids(samplers, positions_Q, logits_QV)
    return [
        chosen if isinstance(chosen, ColmError) else _choice(sampler, chosen, logits_V, logprobs_V)
        for sampler, chosen, logits_V, logprobs_V in zip(
            samplers, chosen_Q, logits_QV.numpy(), logprobs_QV, strict=True
        )
    ]


def choose_ids(samplers: Sequence[Sampler], positions_Q: Sequence[int], logits_QV: Tensor) -> list[int | ColmError]:
    """The tokens that `choose` chooses, without their log probabilities, which take most of its time."""
    rows = logits_QV.cpu().float().numpy()
    return [_chosen(*of_row) for of_row in zip(samplers, positions_Q, rows, strict=True)]


def _choice(sampler: Sampler, token_id: int, logits_V: NDArray[np.float32], logprobs_V: NDArray[np.float32]) -> Choice:
    top_ids = _likeliest(logits_V, sampler.params.top_logprobs)
    top_logprobs = tuple(zip(top_ids.tolist(), logprobs_V[top_ids].tolist(), strict=True))
    return Choice(token_id, float(logprobs_V[token_id]), top_logprobs)


def _chosen(sampler: Sampler, position: int, logits_V: NDArray[np.float32]) -> int | ColmError:
    if not np.isfinite(logits_V.max()):
        return NotFinite("the model's logits are not finite; its weights or the dtype are at fault")
    params = sampler.params
    try:
        ids_C = sampler.allowed(position, len(logits_V))
    except InvalidRequest as err:
        return err
    edited_V = sampler.edited(position, logits_V)
    edited_C = edited_V if ids_C is None else edited_V[ids_C]
    chosen = int(edited_C.argmax()) if params.temperature == 0 else _draw(params, sampler.uniform(position), edited_C)
    return chosen if ids_C is None else int(ids_C[chosen])


def _draw(params: SamplingParams, number: float, logits_V: NDArray[np.float32]) -> int:
    ids_C = _likeliest(logits_V, params.top_k) if params.top_k else None
    logits_C = logits_V if ids_C is None else logits_V[ids_C]
    # From the likeliest down and in float64: no temperature above 0 makes this overflow into NaN.
    with np.errstate(over="ignore"):
        weights_C = np.exp((logits_C - logits_C.max().astype(np.float64)) / params.temperature)
    if params.min_p > 0.0:
        likely_C = np.flatnonzero(weights_C >= params.min_p)  # the likeliest one's is 1
        ids_C = likely_C if ids_C is None else ids_C[likely_C]
        logits_C, weights_C = logits_C[likely_C], weights_C[likely_C]
    if params.top_p < 1.0:
        kept_C = _nucleus(logits_C, weights_C, params.top_p)
        ids_C = kept_C if ids_C is None else ids_C[kept_C]
        weights_C = weights_C[kept_C]
    mass_C = weights_C.cumsum()
    # The number drawn is above 0, so the first token at which the mass reaches it has a weight above 0. It is at most
    # the whole mass, so there is such a token.
    drawn = int(mass_C.searchsorted(number * mass_C[-1]))
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
