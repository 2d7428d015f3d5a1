"""From logits to a token.

Shapes: V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from colm.errors import ColmError
from colm.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token with its log probability under the model, before temperature and cuts."""

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses one request's tokens; the same seed, parameters and logits give the same tokens."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def choose(self, logits_V: Tensor) -> Choice:
        """Pick the next token.

        Raises:
            ColmError: the model's output is not finite.
        """
        params = self._params
        logprobs_V = logits_V.float().log_softmax(dim=0)
        if not logprobs_V.max() > float("-inf"):
            raise ColmError("the model's logits are not finite; its weights or the dtype are at fault")
        token_id = int(logits_V.argmax()) if params.temperature == 0 else self._draw(logprobs_V)
        logprob = float(logprobs_V[token_id])
        top = logprobs_V.topk(min(params.top_logprobs, len(logprobs_V)))
        return Choice(token_id, logprob, tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))

    def _draw(self, logprobs_V: Tensor) -> int:
        params = self._params
        ordered, token_ids = logprobs_V.sort(descending=True, stable=True)
        # From the likeliest down and in float64: no temperature above 0 makes this overflow into NaN.
        scaled = (ordered - ordered[0]).double() / params.temperature
        if params.top_k:
            scaled = scaled[: params.top_k]
        probabilities = scaled.softmax(dim=0)
        if params.top_p < 1.0:
            # Mass before a token below top_p: keeps the first token always, and the one that crosses the line.
            before = probabilities.cumsum(dim=0) - probabilities
            probabilities = probabilities * (before < params.top_p)
        drawn = torch.multinomial(probabilities, 1, generator=self._generator)
        return int(token_ids[drawn])
