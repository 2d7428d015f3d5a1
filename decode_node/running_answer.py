"""The state of one answer: which tokens to read next, the text held back, and whether the answer has finished.

Shapes: M pages of the answer, N tokens of it that another node has made.
"""

from collections.abc import Collection, Sequence
from itertools import zip_longest

import numpy as np
from colm_kernels.decode_attention import MAX_QUERY_TOKENS
from numpy.typing import NDArray

from colm.errors import ColmError, InvalidRequest
from colm.events import FinishReason, Token
from colm.sampling import SamplingParams
from colm.text.detokenizer import TextStream
from decode_node.constraint import ConstrainedText
from decode_node.drafter import Drafter
from decode_node.plan import PlanRow
from decode_node.sampler import Choice, Sampler
from decode_node.stop_matcher import StopMatcher


class RunningAnswer:
    """One request's decode state.

    Args:
        unread_token_ids: the prompt's tokens behind those in the cache, at least one; the first new token comes with
            the last of them.
        position: tokens in the cache.
        num_chains: scale of the first step; it may change between steps, drafts or not, since keys and values are chain
            1's at every scale.
        stop_token_ids: any of these ends the answer.
        text_stream: None for a model without a tokenizer; tokens then carry no text.
        drafter: decides how many tokens chain 1 drafts before all chains verify them; None drafts none.
        prompt_token_ids: all of the prompt's, for the repetition penalty.
        constrained: what the answer may say; None for anything.
        made_token_ids_N: the answer so far, where another node began it. Its tokens are read anew, their text is passed
            over, and the answer goes on as it would have there.

    Raises:
        InvalidRequest: the answer so far goes on behind its own end.
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
        drafter: Drafter | None = None,
        prompt_token_ids: Sequence[int] | NDArray[np.int64] = (),
        constrained: ConstrainedText | None = None,
        made_token_ids_N: Sequence[int] = (),
    ) -> None:
        self._unread_token_ids = (*unread_token_ids, *made_token_ids_N)
        self._position = position
        self.num_chains = num_chains
        self._max_new_tokens = max_new_tokens
        self._table_M = table_M
        self._stop_token_ids = frozenset(stop_token_ids)
        self._text_stream = text_stream
        self._stop_matcher = StopMatcher(sampling.stop)
        self._min_tokens = sampling.min_tokens
        self._drafter = drafter
        # Behind the unread tokens; chain 1 has read all but the last, and none is part of the answer yet.
        self._draft_token_ids: list[int] = []
        self._num_to_draft: int | None = None
        self.sampler = Sampler(
            sampling,
            first_position=position + len(unread_token_ids),
            prompt_token_ids=prompt_token_ids,
            end_token_ids=self._stop_token_ids,
            draft_token_ids=self._draft_token_ids,
            constrained=constrained,
        )
        self.num_new_tokens = 0
        self.num_draft_tokens = 0
        """Drafts that were verified."""
        self.num_accepted_tokens = 0
        """Those of them that became tokens of the answer."""
        self.finish_reason: FinishReason | None = None
        self.error: ColmError | None = None
        """Why the answer cannot go on."""
        self.tail = ""
        """Text that was held back, and belongs to the answer once it has finished."""
        for number, token_id in enumerate(made_token_ids_N):
            if self.finish_reason is not None:
                raise InvalidRequest("num_answer_tokens", len(made_token_ids_N), f"the answer ended after {number}")
            self._append(token_id)

    @property
    def num_left(self) -> int:
        """Tokens that it may still get."""
        return self._max_new_tokens - self.num_new_tokens

    @property
    def num_unread(self) -> int:
        """Tokens up to and with the newest that the cache does not hold; 1 where the answer only goes on."""
        return len(self._unread_token_ids)

    @property
    def num_drafts(self) -> int:
        """Tokens behind the newest that chain 1 has drafted and nothing has verified."""
        return len(self._draft_token_ids)

    def text_of(self, token_id: int) -> str:
        """The text of an answer that begins with a token which it may not get; nothing changes."""
        if self._text_stream is None or token_id in self._stop_token_ids:
            return ""
        return self._text_stream.peek(token_id)

    def draft_row(self, num_answers: int) -> PlanRow | None:
        """The row with which chain 1 drafts one more token; None where the answer wants no more of them, or none.

        Its verification writes keys and values over those of the draft, which may be of other weights. None lies behind
        the last token that the answer may have.

        Args:
            num_answers: in the batch.
        """
        # The first token comes at once.
        if self._drafter is None or self.num_new_tokens == 0 or len(self._unread_token_ids) > 1:
            return None
        drafts = self._draft_token_ids
        if self._num_to_draft is None:
            room = self._max_new_tokens - self.num_new_tokens - 1
            self._num_to_draft = min(room, self._drafter.num_drafts(num_answers))
        if len(drafts) >= self._num_to_draft:
            return None
        (last,) = drafts[-1:] or self._unread_token_ids
        return PlanRow((last,), self._position + len(drafts), 1, self._table_M, is_draft=True)

    def add_draft(self, token_id: int | ColmError) -> None:
        """Take what chain 1 chose at `draft_row`. No draft follows an end of the answer, nor logits that failed."""
        if not isinstance(token_id, ColmError):
            self._draft_token_ids.append(token_id)
        if isinstance(token_id, ColmError) or token_id in self._stop_token_ids:
            self._num_to_draft = 0

    def next_rows(self, max_tokens: int | None = None) -> list[PlanRow]:
        """The rows that the next step reads: the newest token's, then those of others that the cache does not hold.

        Drafts stand behind the newest token in its row, and ask for logits as well.

        Of all tokens but the newest only keys and values are wanted, so they run through chain 1 alone.

        Args:
            max_tokens: to read, at least 1; the last drafts are left out first, then the newest token and those before
                it, and no row asks for logits. None reads all.
        """
        table_M, num_earlier = self._table_M, self.num_unread - 1
        rows = []
        if max_tokens is None or max_tokens > num_earlier:
            drafts = self._draft_token_ids[: None if max_tokens is None else max_tokens - self.num_unread]
            read = (self._unread_token_ids[-1], *drafts)
            rows = [PlanRow(read, self._position + num_earlier, self.num_chains, table_M, num_logits=len(read))]
        earlier = self._unread_token_ids[:num_earlier][:max_tokens]
        for start in range(0, len(earlier), MAX_QUERY_TOKENS):
            piece = earlier[start : start + MAX_QUERY_TOKENS]
            rows.append(PlanRow(piece, self._position + start, 1, table_M, num_logits=0))
        return rows

    def note_read(self, num_tokens: int) -> None:
        """Note that a step has read so many of the unread tokens, and not the newest: it has chosen nothing."""
        self._position += num_tokens
        self._unread_token_ids = self._unread_token_ids[num_tokens:]

    def advance(self, outcomes: Sequence[Choice | ColmError]) -> list[Token]:
        """Note that a step has read all unread tokens, the newest too, and append what it has chosen.

        Sets `finish_reason` at the last token, or `error`.

        Args:
            outcomes: what follows the newest token, then what follows each of the first drafts; the others are
                forgotten.

        Returns:
            A token for each outcome, up to the first that is another than its draft, or that ends the answer; those
            behind it follow what is not the answer's text, and are dropped.
        """
        drafts = self._draft_token_ids[: len(outcomes) - 1]
        self._draft_token_ids.clear()
        self._num_to_draft = None
        self.note_read(self.num_unread)
        tokens: list[Token] = []
        for outcome, draft in zip_longest(outcomes, drafts):
            if isinstance(outcome, ColmError):
                self.error = outcome
                break
            tokens.append(self._take(outcome))
            if self.finish_reason is not None or outcome.token_id != draft:
                break
        # Chain 1 has nothing to say of its own drafts, left from before its answer went down to it.
        if self._drafter is not None and drafts and self.num_chains > 1:
            num_accepted = sum(token.token_id == draft for token, draft in zip(tokens, drafts, strict=False))
            self.num_draft_tokens += len(drafts)
            self.num_accepted_tokens += num_accepted
            self._drafter.note(num_accepted, was_refused=num_accepted < min(len(tokens), len(drafts)))
        return tokens

    def _take(self, choice: Choice) -> Token:
        self.note_read(self.num_unread)  # those of a draft that has come true
        self._unread_token_ids = (choice.token_id,)
        return Token(
            token_id=choice.token_id,
            text=self._append(choice.token_id),
            logprob=choice.logprob,
            num_chains=self.num_chains,
            top_logprobs=choice.top_logprobs,
        )

    def _append(self, token_id: int) -> str:
        """Add a token to the answer, and return its text."""
        self.num_new_tokens += 1
        self.sampler.take(token_id)
        ends_here = token_id in self._stop_token_ids
        text = "" if ends_here else self._decode(token_id)
        if ends_here or self._stop_matcher.stopped or self.sampler.has_said_all:
            self.finish_reason = FinishReason.STOP
        elif self.num_new_tokens >= self._max_new_tokens:
            self.finish_reason = FinishReason.LENGTH
        if self.finish_reason is not None and not self._stop_matcher.stopped:
            self._flush()
        return text

    def _decode(self, token_id: int) -> str:
        return "" if self._text_stream is None else self._until_stop(self._text_stream.push(token_id))

    def _until_stop(self, text: str) -> str:
        return text if self.num_new_tokens <= self._min_tokens else self._stop_matcher.push(text)

    def _flush(self) -> None:
        if self._text_stream is None:
            return
        self.tail = self._until_stop(self._text_stream.flush())
        if self._stop_matcher.stopped:
            self.finish_reason = FinishReason.STOP
        else:
            self.tail += self._stop_matcher.flush()
