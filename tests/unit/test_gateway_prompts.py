"""The time and memory that one prompt can cost the gateway, over a real server with tokenizers that misbehave."""

import asyncio
import threading
from collections.abc import AsyncIterator, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import grpc
import numpy as np
import pytest
import tokenizers
from numpy.typing import NDArray
from tokenizers import normalizers

from cluster.front_door.placement import DecodeLease
from cluster.front_door.tokenising import NUM_THREADS
from colm.checkpoint import TextConfig
from colm.client import AsyncClient
from colm.errors import ColmError, DeadlineExceeded, InvalidRequest, PeerUnavailable
from colm.line import Beat
from colm.text import tokenizer_schema
from colm.text.bound import TokenBound
from colm.text.regex_cost import Cost
from colm.text.tokenizer import Tokenizer
from colm.wire.endpoint import open_channel
from colm.wire.security import Security
from colm.wire.status import error_of
from colm.wire.v1 import generation_service_pb2 as pb
from colm.wire.v1.generation_service_pb2_grpc import GenerationServiceStub
from tests.encoders import BACKTRACKING, with_words
from tests.gateway import gateway as serving
from tests.tiny import CHAT_TEMPLATE, tiny_config, tiny_tokenizer

NOW = datetime(2026, 3, 5, tzinfo=UTC)
CONTEXT = 512
MAX_NEW_TOKENS = 12
MAX_DOCUMENT_BYTES = 64 << 20
LIMIT_S = 30.0


class NoDecodeNodes:
    """A pool without nodes: a prompt that is accepted goes no further."""

    @asynccontextmanager
    async def lease(
        self,
        *,
        beat: Beat,
        refused_by: Collection[str] = (),  # noqa: ARG002 - the pool's contract
    ) -> AsyncIterator[DecodeLease]:
        await beat(0)
        raise PeerUnavailable("the prompt was accepted")
        yield


def text_of(
    encoder: tokenizers.Tokenizer, kind: type[Tokenizer] = Tokenizer, template: str = CHAT_TEMPLATE
) -> Tokenizer:
    return kind(encoder.to_str().encode(), TextConfig(chat_template=template), lambda: NOW)


def gateway(tokenizer: Tokenizer) -> AbstractAsyncContextManager[str]:
    return serving(
        tiny_config(max_context=CONTEXT),
        NoDecodeNodes(),
        tokenizer,
        max_document_bytes=MAX_DOCUMENT_BYTES,
        default_max_new_tokens=MAX_NEW_TOKENS,
        max_new_tokens=CONTEXT,
        default_timeout_s=LIMIT_S,
        max_timeout_s=LIMIT_S,
    )


async def failure(address: str, document: str | bytes, **options: Any) -> ColmError:
    async with AsyncClient(address) as client:
        try:
            async for _ in client.generate(document, **options):
                pass
        except ColmError as error:
            return error
    raise AssertionError("there is no decode node, and still there was an answer")


async def test_a_document_that_cannot_fit_is_refused_while_it_uploads() -> None:
    """Bug: the whole document was collected and tokenised before its length was checked."""
    bound = TokenBound.of(tiny_tokenizer())
    assert bound is not None
    limit = (CONTEXT - MAX_NEW_TOKENS) * bound.max_token_bytes

    async def upload() -> AsyncIterator[pb.GenerateRequest]:
        yield pb.GenerateRequest(open=pb.OpenGenerate(timeout_s=5.0))
        yield pb.GenerateRequest(document=b"x" * (limit + 1))
        await asyncio.Event().wait()

    async with gateway(text_of(tiny_tokenizer())) as address, open_channel(address, Security()) as channel:
        call = GenerationServiceStub(channel).Generate(upload(), timeout=LIMIT_S)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
    refusal = error_of(raised.value, "gateway")
    assert isinstance(refusal, InvalidRequest)
    assert (refusal.field, refusal.value) == ("document", f"'over {limit} bytes'")
    assert f"at most {limit} bytes" in refusal.limit
    assert f"max_new_tokens={MAX_NEW_TOKENS} must fit the model's context of {CONTEXT}" in refusal.limit


async def test_spaces_that_the_template_trims_take_no_room() -> None:
    trimming = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
    async with gateway(text_of(tiny_tokenizer(), template=trimming)) as address:
        assert "was accepted" in str(await failure(address, " " * 100_000 + "x" + "\n" * 100_000))


@pytest.mark.parametrize("spare", [0, 1])
async def test_a_prompt_may_fill_the_context_and_no_more(spare: int) -> None:
    # " the" is one token; "the" at the beginning is two.
    document = "the" + " the" * (CONTEXT - MAX_NEW_TOKENS - 1 + spare)
    async with gateway(text_of(tiny_tokenizer())) as address:
        error = await failure(address, document, chat=False)
    if not spare:
        assert "was accepted" in str(error)
    else:
        assert isinstance(error, InvalidRequest)
        assert (error.field, error.value) == ("document", f"'over {CONTEXT - MAX_NEW_TOKENS} prompt tokens'")


async def test_a_long_text_without_a_bound_in_bytes_is_refused_by_its_first_piece() -> None:
    """A normalizer may shorten, so only tokens tell; 32 MiB of them took gigabytes."""
    counts: list[int] = []

    class Counting(Tokenizer):
        def encode_prompt(self, *, progress: Any, **prompt: Any) -> NDArray[np.int64]:
            def count(num_ids: int) -> None:
                counts.append(num_ids)
                progress(num_ids)

            return super().encode_prompt(progress=count, **prompt)

    encoder = tiny_tokenizer()
    encoder.normalizer = normalizers.NFC()
    async with gateway(text_of(encoder, Counting)) as address:
        error = await failure(address, b"12345678" * (4 << 20))
    assert isinstance(error, InvalidRequest)
    assert "prompt tokens" in str(error)
    assert counts[-1] < 100_000


@pytest.mark.parametrize("chat", [True, False])
async def test_a_document_at_which_the_tokenizer_panics_is_refused(chat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a panic is no `Exception`, so the call was never answered and held its place until its deadline."""
    monkeypatch.setattr(tokenizer_schema, "cost_of", lambda _: Cost())  # which would refuse it as it is loaded
    async with gateway(text_of(with_words(BACKTRACKING))) as address:
        for _ in range(2):
            error = await failure(address, "so " + "a" * 30, chat=chat, timeout_s=10.0)
            assert isinstance(error, InvalidRequest)
            assert error.field == "document"
            assert "the model's tokenizer cannot read it" in error.limit
        assert "was accepted" in str(await failure(address, "aab", chat=chat))


async def test_requests_that_are_over_hold_no_more_threads_than_there_are() -> None:
    """Bug: each such request left a thread behind that tokenised on, uncounted."""
    lock, go_on, num_now, most = threading.Lock(), threading.Event(), 0, 0

    class Stuck(Tokenizer):
        def encode_prompt(self, **prompt: Any) -> NDArray[np.int64]:
            nonlocal num_now, most
            with lock:
                num_now += 1
                most = max(most, num_now)
            try:
                assert go_on.wait(LIMIT_S)
                return super().encode_prompt(**prompt)
            finally:
                with lock:
                    num_now -= 1

    async with gateway(text_of(tiny_tokenizer(), Stuck)) as address:
        try:
            calls = [failure(address, "the end", timeout_s=0.5) for _ in range(NUM_THREADS + 3)]
            assert {type(error) for error in await asyncio.gather(*calls)} == {DeadlineExceeded}
            assert most <= NUM_THREADS
            assert num_now == most
        finally:
            go_on.set()
        assert "was accepted" in str(await failure(address, "the end"))
        assert most <= NUM_THREADS
