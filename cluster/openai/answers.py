"""Answers in OpenAI's shape, whole and in chunks."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from colm.events import Finished, ProvisionalToken, Token, tokens_by_scale
from colm.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Choice:
    """One answer as it grows."""

    index: int
    num_prompt_tokens: int = 0
    text: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finished: Finished | None = None


class Shape:
    """Makes the bodies of one call.

    Args:
        is_chat: messages instead of completions.
        model: its name.
        tokenizer: of the model; None for one that serves token ids.
        wants_logprobs: each token's goes with it.
        counts_along: each chunk says how many tokens its answer has so far.
    """

    def __init__(
        self, *, is_chat: bool, model: str, tokenizer: Tokenizer | None, wants_logprobs: bool, counts_along: bool
    ) -> None:
        self._is_chat = is_chat
        self._tokenizer = tokenizer
        self._wants_logprobs = wants_logprobs
        self._counts_along = counts_along
        self._head: dict[str, Any] = {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        return {
            **self._head,
            "object": "chat.completion" if self._is_chat else "text_completion",
            "choices": [self._whole_choice(choice) for choice in choices],
            "usage": usage_of(choices),
            "colm": details_of(choices),
        }

    def first(self, choice: Choice) -> dict[str, Any] | None:
        """The chunk that begins a streamed message; completions have none."""
        return self._chunk(choice, {"role": "assistant", "content": ""}) if self._is_chat else None

    def token(self, choice: Choice, token: Token, num_chars: int) -> dict[str, Any] | None:
        """The chunk of a token; None if it has completed no text and says nothing else that somebody wants.

        Args:
            choice: the answer so far.
            token: its last one.
            num_chars: of the answer's text before it.
        """
        says_more = self._wants_logprobs or token.confirms_provisional is not None
        if not (token.text or says_more):
            return None
        logprobs = self._logprobs([token], num_chars) if self._wants_logprobs else None
        chunk = self._chunk(choice, self._delta(token.text), logprobs=logprobs)
        chunk["choices"][0]["num_chains"] = token.num_chains
        if token.confirms_provisional is not None:
            chunk["choices"][0]["confirms_provisional"] = token.confirms_provisional
        return chunk

    def provisional(self, choice: Choice, token: ProvisionalToken) -> dict[str, Any]:
        """The chunk of a provisional token: without choices, since clients add up what stands there."""
        said = {"index": choice.index, "token_id": token.token_id, "text": token.text}
        return {**self._head, "object": self._chunk_object, "choices": [], "provisional_token": said}

    def last(self, choice: Choice, finished: Finished) -> list[dict[str, Any]]:
        """The chunks that end an answer: what was held back, and why it has ended."""
        held = [self._chunk(choice, self._delta(finished.text))] if finished.text else []
        return [*held, self._chunk(choice, {} if self._is_chat else {"text": ""}, reason=finished.reason.value)]

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The chunk behind the last one, for those who asked for it."""
        return {
            **self._head,
            "object": self._chunk_object,
            "choices": [],
            "usage": usage_of(choices),
            "colm": details_of(choices),
        }

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self._is_chat else "text_completion"

    def _delta(self, text: str) -> dict[str, Any]:
        return {"content": text} if self._is_chat else {"text": text}

    def _chunk(
        self, choice: Choice, delta: dict[str, Any], *, logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        said = {"delta": delta} if self._is_chat else delta
        body = {"index": choice.index, **said, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": _counts(choice.num_prompt_tokens, len(choice.tokens))} if self._counts_along else {}
        return {**self._head, "object": self._chunk_object, "choices": [body], **usage}

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        assert choice.finished is not None
        text = "".join(choice.text) + choice.finished.text
        said: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if self._is_chat else {"text": text}
        )
        logprobs = self._logprobs(choice.tokens, 0) if self._wants_logprobs else None
        return {
            "index": choice.index, **said, "logprobs": logprobs, "finish_reason": choice.finished.reason.value,
        }  # fmt: skip

    def _logprobs(self, tokens: Sequence[Token], num_chars: int) -> dict[str, Any]:
        if self._is_chat:
            return {
                "content": [
                    self._named(token.token_id, token.logprob)
                    | {"top_logprobs": [self._named(*each) for each in token.top_logprobs]}
                    for token in tokens
                ],
                "refusal": None,
            }
        offsets = []
        for token in tokens:
            offsets.append(num_chars)
            num_chars += len(token.text)
        return {
            "tokens": [self._bytes(token.token_id).decode(errors="replace") for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self._bytes(token_id).decode(errors="replace"): logprob for token_id, logprob in token.top_logprobs}
                for token in tokens
            ],
            "text_offset": offsets,
        }

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    def _bytes(self, token_id: int) -> bytes:
        # A model without a tokenizer has no text: its tokens are their numbers.
        return str(token_id).encode() if self._tokenizer is None else self._tokenizer.token_bytes(token_id)


def usage_of(choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens of the prompt, once, and of all answers."""
    usages = [choice.finished.usage for choice in choices if choice.finished is not None]
    num_prompt = usages[0].num_prompt_tokens if usages else 0
    num_cached = usages[0].num_cached_tokens + usages[0].num_prefill_cached_tokens if usages else 0
    num_new = sum(usage.num_new_tokens for usage in usages)
    return {
        **_counts(num_prompt, num_new),
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def _counts(num_prompt: int, num_new: int) -> dict[str, int]:
    return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}


def details_of(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """What this system says of each answer beside OpenAI's fields: seconds, and bytes of keys and values."""
    return [
        {
            "num_chains": choice.tokens[-1].num_chains if choice.tokens else None,
            "tokens_by_scale": tokens_by_scale(choice.tokens),
            "queue_s": choice.finished.timings.queue_s,
            "prefill_s": choice.finished.timings.prefill_s,
            "first_token_s": choice.finished.timings.first_token_s,
            "provisional_token_s": choice.finished.timings.provisional_token_s,
            "decode_s": choice.finished.timings.decode_s,
            "kv_received_bytes": choice.finished.usage.kv_received_bytes,
        }
        for choice in choices
        if choice.finished is not None
    ]
