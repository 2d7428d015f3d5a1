"""The state of one answer: which tokens to read next, the text held back, and whether the answer has finished.

Shapes: M pages of the answer, N tokens of it that another node has made.
"""

from collections.abc import Collection, Sequence

import numpy as np
from colm_kernels.decode_attention import MAX_QUERY_TOKENS
from numpy.typing import NDArray

from colm.errors import InvalidRequest
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
        made_token_ids_N: the answer so far, where another node began it. Its tokens are read anew, their text and
            random numbers are passed over, and the answer goes on as it would have there.

    Raises:
        InvalidRequest: the answer so far goes on behind its own end.
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
        made_token_ids_N: Sequence[int] = (),
    ) -> None:
        self._unread_token_ids = (*unread_token_ids, *made_token_ids_N)
        # What the next step reads of them. An answer's tokens were read one by one: rows this few give the same bits.
        self._num_next = len(unread_token_ids)
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
        for number, token_id in enumerate(made_token_ids_N):
            if self.finish_reason is not None:
                raise InvalidRequest("num_answer_tokens", len(made_token_ids_N), f"the answer ended after {number}")
            self._append(token_id)
        self.sampler.skip(len(made_token_ids_N))

    def next_rows(self) -> list[PlanRow]:
        """The rows that the next step reads: one token's, then those of others that the cache does not hold.

        Of all tokens but the newest only keys and values are wanted, so they run through chain 1 alone.
        """
        *earlier, last = self._unread_token_ids[: self._num_next]
        is_newest = self._num_next == len(self._unread_token_ids)
        first, table_M = self._position, self._table_M
        starts = range(0, len(earlier), MAX_QUERY_TOKENS)
        pieces = [(start, tuple(earlier[start : start + MAX_QUERY_TOKENS])) for start in starts]
        num_chains = self._num_chains if is_newest else 1
        return [
            PlanRow((last,), first + len(earlier), num_chains, table_M, num_logits=int(is_newest)),
            *(PlanRow(piece, first + start, 1, table_M, num_logits=0) for start, piece in pieces),
        ]

    def advance(self, choices: Sequence[Choice]) -> list[Token]:
        """Note that a step has read `next_rows`, and append its choices; sets `finish_reason` at the last token.

        Returns:
            A token for each choice, up to the one that ends the answer; later choices are dropped.
        """
        self._note_read(self._num_next)
        tokens = []
        for choice in choices:
            tokens.append(self._take(choice))
            if self.finish_reason is not None:
                break
        return tokens

    def _note_read(self, num_tokens: int) -> None:
        self._position += num_tokens
        self._unread_token_ids = self._unread_token_ids[num_tokens:]
        self._num_next = min(len(self._unread_token_ids), MAX_QUERY_TOKENS)

    def _take(self, choice: Choice) -> Token:
        self._note_read(len(self._unread_token_ids))  # those of a draft that has come true
        self._unread_token_ids, self._num_next = (choice.token_id,), 1
        return Token(
            token_id=choice.token_id,
            text=self._append(choice.token_id),
            logprob=choice.logprob,
            num_chains=self._num_chains,
            top_logprobs=choice.top_logprobs,
        )

    def _append(self, token_id: int) -> str:
        """Add a token to the answer, and return its text."""
        self.num_new_tokens += 1
        ends_here = token_id in self._stop_token_ids
        text = "" if ends_here else self._decode(token_id)
        if ends_here or self._stop_matcher.stopped:
            self.finish_reason = FinishReason.STOP
        elif self.num_new_tokens >= self._max_new_tokens:
            self.finish_reason = FinishReason.LENGTH
        if self.finish_reason is not None and not self._stop_matcher.stopped:
            self._flush()
        return text

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
