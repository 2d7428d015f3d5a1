"""Reads an uploaded prompt: checks it while it arrives, then tokenises it."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from cluster.front_door.plan import Plan
from cluster.front_door.tokenising import TextExtent, TokenisingThreads
from colm.errors import CapacityExceeded, InvalidRequest
from colm.text.bound import TokenBound

PromptPart = bytes | NDArray[np.int64]
"""The next piece of the document in UTF-8, or of a prompt given as token ids; no prompt has both."""


class PromptReader:
    """Reads the prompts of requests.

    Args:
        max_document_bytes: longer documents are refused.
        max_upload_bytes: of all prompts that are being read.
    """

    def __init__(self, *, max_document_bytes: int, max_upload_bytes: int) -> None:
        self._max_document_bytes = max_document_bytes
        self._max_upload_bytes = max_upload_bytes
        self._num_held_bytes = 0
        self._threads = TokenisingThreads()

    async def read(self, plan: Plan, parts: AsyncIterator[PromptPart]) -> NDArray[np.int64]:
        """Read a prompt to its end and return its token ids, at least one.

        Raises:
            InvalidRequest: the prompt cannot be served. It is raised as soon as that is known, even during the upload.
            CapacityExceeded: all prompts that are being read have no room for it.
        """
        with self._held() as hold:
            return await self._read(plan, parts, hold)

    @contextmanager
    def _held(self) -> Iterator[Callable[[int], None]]:
        """Count bytes of a prompt during the block; yields a function that takes more of them, or refuses."""
        num_bytes = 0

        def hold(num_more: int) -> None:
            nonlocal num_bytes
            if self._num_held_bytes + num_more > self._max_upload_bytes:
                raise CapacityExceeded(
                    f"the prompts that are being read have no room for this one, with "
                    f"gateway.max_upload_bytes={self._max_upload_bytes}; try again later"
                )
            self._num_held_bytes += num_more
            num_bytes += num_more

        try:
            yield hold
        finally:
            self._num_held_bytes -= num_bytes

    async def _read(
        self, plan: Plan, parts: AsyncIterator[PromptPart], hold: Callable[[int], None]
    ) -> NDArray[np.int64]:
        document, extent = bytearray(), TextExtent(_bound(plan))
        pieces, num_ids = [np.empty(0, dtype=np.int64)], 0
        self._hold_history(plan, hold)
        async for part in parts:
            hold(len(part) if isinstance(part, bytes) else part.nbytes)
            if isinstance(part, bytes):
                document += part
                if len(document) > (limit := self._max_document_bytes):
                    raise InvalidRequest("document", f"over {limit} bytes", f"at most {limit} bytes")
                extent.add(part)
                self._check_extent(extent, plan)
            else:
                pieces.append(part)
                num_ids += len(part)
                if num_ids > (context := plan.model.config.max_context):
                    limit_of_ids = f"at most {context}, the context"
                    raise InvalidRequest("token_ids", f"over {context} ids", limit_of_ids)
        if num_ids:
            if document or plan.prompt or plan.history:
                raise InvalidRequest("token_ids", f"{num_ids} ids", "give either token ids or text, not both")
            token_ids = np.concatenate(pieces)
        else:
            token_ids = await self._threads.run(lambda check: self._tokenise(plan, document, check))
        self._check_token_ids(token_ids, plan)
        return token_ids

    def _hold_history(self, plan: Plan, hold: Callable[[int], None]) -> None:
        num_bytes = sum(len(message.content.encode()) for message in plan.history)
        if num_bytes > (limit := self._max_document_bytes):
            raise InvalidRequest("history", f"{num_bytes} bytes", f"at most {limit} bytes")
        hold(num_bytes)

    def _check_extent(self, extent: TextExtent, plan: Plan) -> None:
        """Refuse a document with more bytes than the most tokens could stand for, before the rest of it arrives."""
        if (bound := _bound(plan)) is None:
            return
        limit = _max_prompt_tokens(plan) * bound.max_token_bytes
        if extent.num_bytes > limit:
            longest = f"no token stands for more than {bound.max_token_bytes} bytes"
            fit = f"at most {limit} bytes: {_must_fit(plan)}, and {longest}"
            raise InvalidRequest("document", f"over {limit} bytes", fit)

    def _tokenise(self, plan: Plan, document: bytearray, check_wanted: Callable[[], None]) -> NDArray[np.int64]:
        tokenizer = plan.model.tokenizer
        if not document and not plan.prompt:
            raise InvalidRequest("prompt", "", "document and prompt must not both be empty")
        if tokenizer is None:
            raise InvalidRequest("prompt", plan.prompt, f"model {plan.model.name!r} has no tokenizer; send token_ids")
        try:
            text = document.decode("utf-8")
        except UnicodeDecodeError as err:
            shown = bytes(document[err.start : err.start + 8])
            raise InvalidRequest(
                "document", shown, f"must be UTF-8; byte {err.start} breaks it ({err.reason})"
            ) from err
        chat = tokenizer.has_chat_template if plan.chat is None else plan.chat

        def progress(num_tokens: int) -> None:
            check_wanted()
            self._check_length(num_tokens, plan)

        return tokenizer.encode_prompt(
            document=text, prompt=plan.prompt, chat=chat or bool(plan.history), history=plan.history, progress=progress
        )

    def _check_token_ids(self, token_ids: NDArray[np.int64], plan: Plan) -> None:
        if not len(token_ids):
            raise InvalidRequest("prompt", "", "the prompt has no tokens")
        self._check_length(len(token_ids), plan)
        size = plan.model.config.vocab_size
        for worst in (int(token_ids.max()), int(token_ids.min())):
            if not 0 <= worst < size:
                raise InvalidRequest("token_ids", worst, f"must be below the vocabulary size {size}, and not negative")

    def _check_length(self, num_tokens: int, plan: Plan) -> None:
        if num_tokens > (limit := _max_prompt_tokens(plan)):
            raise InvalidRequest("document", f"over {limit} prompt tokens", _must_fit(plan))


def _bound(plan: Plan) -> TokenBound | None:
    return None if plan.model.tokenizer is None else plan.model.tokenizer.bound


def _max_prompt_tokens(plan: Plan) -> int:
    return max(0, plan.model.config.max_context - plan.max_new_tokens)


def _must_fit(plan: Plan) -> str:
    context = plan.model.config.max_context
    return f"prompt and max_new_tokens={plan.max_new_tokens} must fit the model's context of {context}"
