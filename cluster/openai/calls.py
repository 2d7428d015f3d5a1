"""One call of OpenAI's protocol: what is sent of its answers, whole or as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from cluster.client_requests import ClientRequests
from cluster.client_tokens import Client
from cluster.front_door.prompt import PromptPart
from cluster.front_door.pulled import pulled
from cluster.openai.answers import Choice, Shape
from cluster.openai.errors import answer_of, body_of
from cluster.openai.schema import Ask
from colm import tracing
from colm.events import Accepted, Event, Finished, PrefillProgress, ProvisionalToken, Queued, Token
from colm.request import GenerateRequest

Numbered = tuple[int, Event]
"""An event of the answer of that number."""

_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]


class Call:
    """An ASGI response that runs a call, and ends it everywhere if the client goes away.

    Args:
        requests: lets in the request for each of its answers.
        client: who calls.
        ask: what is asked.
        document: before the prompt, and the prompt's text.
        shape: of its answers.
    """

    def __init__(self, requests: ClientRequests, client: Client, ask: Ask, document: bytes, shape: Shape) -> None:
        self._requests = requests
        self._client = client
        self._ask = ask
        self._document = document
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; a client that is gone ends the work."""
        working = asyncio.create_task(self._work(scope, receive, send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.wait([working, leaving])
        if not working.cancelled():
            working.result()

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_begun = False
        try:
            async with pulled(self._answer) as events:
                # What is wrong with a request shows before its second event: a status can still say it.
                first = [each async for each in _until_placed(events)]
                choices = [Choice(number) for number in range(len(self._ask.requests))]
                if not self._ask.is_streamed:
                    await self._read(first, events, choices)
                    whole = JSONResponse(self._shape.whole(choices), headers=dict(_trace_header()))
                    return await whole(scope, receive, send)
                is_begun = True
                await self._stream(first, events, choices, send)
        except Exception as error:  # noqa: BLE001 - whatever it is, it becomes the call's one answer
            if not is_begun:
                return await answer_of(error)(scope, receive, send)
            await _send(send, _event(body_of(error)), more=False)

    async def _answer(self, emit: Callable[[Numbered], Awaitable[None]]) -> None:
        """Emit the events of all answers as they come; the first error ends them all."""

        async def one(number: int, request: GenerateRequest) -> None:
            async with (
                self._requests.open(self._client) as opened,
                opened.generate(request, _parts(self._ask, self._document)) as events,
            ):
                async for event in events:
                    await emit((number, event))
                    if not isinstance(event, Accepted | Queued):
                        is_placed.set()

        # Answers to one prompt share its prefill, on the node that the first has got.
        is_placed = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                for number, request in enumerate(self._ask.requests):
                    if number == 1:
                        await is_placed.wait()
                    group.create_task(one(number, request))
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None

    async def _read(self, first: list[Numbered], events: AsyncIterator[Numbered], choices: list[Choice]) -> None:
        for number, event in first:
            _note(choices[number], event)
        async for number, event in events:
            _note(choices[number], event)

    async def _stream(
        self, first: list[Numbered], events: AsyncIterator[Numbered], choices: list[Choice], send: Send
    ) -> None:
        named = [(name.encode(), value.encode()) for name, value in _trace_header()]
        await send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *named]})
        for number, event in first:
            await self._send_event(send, choices[number], event)
        async for number, event in events:
            await self._send_event(send, choices[number], event)
        if self._ask.includes_usage:
            await _send(send, _event(self._shape.usage(choices)))
        await _send(send, b"data: [DONE]\n\n", more=False)

    async def _send_event(self, send: Send, choice: Choice, event: Event) -> None:
        num_chars = sum(map(len, choice.text)) if self._ask.wants_logprobs else 0
        _note(choice, event)
        match event:
            case Accepted():
                if (chunk := self._shape.first(choice)) is not None:
                    await _send(send, _event(chunk))
            case ProvisionalToken():
                await _send(send, _event(self._shape.provisional(choice, event)))
            case Token():
                if (chunk := self._shape.token(choice, event, num_chars)) is not None:
                    await _send(send, _event(chunk))
            case Finished():
                for chunk in self._shape.last(choice, event):
                    await _send(send, _event(chunk))
            # Comments: clients pass over them, and see that the connection lives.
            case PrefillProgress():
                await _send(send, b": prefill %d of %d tokens\n\n" % (event.num_tokens_done, event.num_tokens_total))
            case Queued():
                await _send(send, f": waits for {event.waits_for.value}, {event.num_ahead} ahead\n\n".encode())


async def _until_placed(events: AsyncIterator[Numbered]) -> AsyncIterator[Numbered]:
    """Events up to the first that follows `Accepted`."""
    async for number, event in events:
        yield number, event
        if not isinstance(event, Accepted):
            return


def _note(choice: Choice, event: Event) -> None:
    match event:
        case Accepted():
            choice.num_prompt_tokens = event.num_prompt_tokens
        case Token():
            choice.tokens.append(event)
            choice.text.append(event.text)
        case Finished():
            choice.finished = event


async def _parts(ask: Ask, document: bytes) -> AsyncIterator[PromptPart]:
    if ask.token_ids:
        yield np.array(ask.token_ids, dtype=np.int64)
    elif document:
        yield document


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _trace_header() -> list[tuple[str, str]]:
    return [("x-trace-id", found)] if (found := tracing.trace_id()) else []


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _send(send: Send, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})
