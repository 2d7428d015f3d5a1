"""The state of one answer: which tokens to read next, the text held back, and whether the answer has finished."""

from collections.abc import Collection, Sequence

import numpy as np
from colm_kernels.decode_attention import MAX_QUERY_TOKENS
from numpy.typing import NDArray

from colm.events import FinishReason, Token
from colm.sampling import SamplingParams
from colm.text.detokenizer import TextStream
from decode_node.plan import PlanRow
from decode_node.sampler import Choice, Sampler
from decode_node.stop_matcher import StopMatcher


class RunningAnswer:
    """One request's decode state.

    Args:
        unread_token_ids: the prompt's tokens behind those in the cache, 1 to `MAX_PROMPT_TOKENS`; the first step reads
            all, and the last one yields the first new token.
        position: tokens in the cache.
        stop_token_ids: any of these ends the answer.
        text_stream: None for a model without a tokenizer; tokens then carry no text.
    """

    def __init__(
        self,
        *,
        unread_token_ids: Sequence[int],
        position: int,
        num_chains: int,
        max_new_tokens: int,
        table_M: NDArray[np.int32],
        sampling: SamplingParams,
        stop_token_ids: Collection[int],
        text_stream: TextStream | None,
    ) -> None:
        self._unread_token_ids = tuple(unread_token_ids)
        self._position = position
        self._num_chains = num_chains
        self._max_new_tokens = max_new_tokens
        self._table_M = table_M
        self._stop_token_ids = frozenset(stop_token_ids)
        self._text_stream = text_stream
        self._stop_matcher = StopMatcher(sampling.stop)
        self.sampler = Sampler(sampling)
        self.num_new_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.tail = ""
        """Text that was held back, and belongs to the answer once it has finished."""

    def next_rows(self) -> list[PlanRow]:
        """The rows that the next step reads: the next token's, then those of a prompt that the cache does not hold.

        Of the prompt's tokens but the last only keys and values are wanted, so they run through chain 1 alone.
        """
        *earlier, last = self._unread_token_ids
        first, table_M = self._position, self._table_M
        starts = range(0, len(earlier), MAX_QUERY_TOKENS)
        pieces = [(start, tuple(earlier[start : start + MAX_QUERY_TOKENS])) for start in starts]
        return [
            PlanRow((last,), first + len(earlier), self._num_chains, table_M),
            *(PlanRow(piece, first + start, 1, table_M, num_logits=0) for start, piece in pieces),
        ]

    def advance(self, choices: Sequence[Choice]) -> list[Token]:
        """Append a step's choices to the answer, in order; sets `finish_reason` at the last token.

        Returns:
            A token for each choice, up to the one that ends the answer; later choices are dropped.
        """
        tokens = []
        for choice in choices:
            tokens.append(self._take(choice))
            if self.finish_reason is not None:
                break
        return tokens

    def _take(self, choice: Choice) -> Token:
        self._position += len(self._unread_token_ids)
        self._unread_token_ids = (choice.token_id,)
        self.num_new_tokens += 1
        ends_here = choice.token_id in self._stop_token_ids
        text = "" if ends_here else self._decode(choice.token_id)
        if ends_here or self._stop_matcher.stopped:
            self.finish_reason = FinishReason.STOP
        elif self.num_new_tokens >= self._max_new_tokens:
            self.finish_reason = FinishReason.LENGTH
        if self.finish_reason is not None and not self._stop_matcher.stopped:
            self._flush()
        return Token(
            token_id=choice.token_id,
            text=text,
            logprob=choice.logprob,
            num_chains=self._num_chains,
            top_logprobs=choice.top_logprobs,
        )

    def _decode(self, token_id: int) -> str:
        return "" if self._text_stream is None else self._stop_matcher.push(self._text_stream.push(token_id))

    def _flush(self) -> None:
        if self._text_stream is None:
            return
        self.tail = self._stop_matcher.push(self._text_stream.flush())
        if self._stop_matcher.stopped:
            self.finish_reason = FinishReason.STOP
        else:
            self.tail += self._stop_matcher.flush()
