"""Both clients against a real server in this process: what they send, and what they refuse to send."""

import asyncio
import io
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from colm.client import AsyncClient, Client
from colm.errors import InvalidRequest, PeerUnavailable
from colm.events import Event, Finished, Reconnecting
from colm.sampling import SamplingParams
from colm.upload import SHORT_CHARS, SHORT_TOKENS
from colm.wire.endpoint import bind, create_server
from colm.wire.security import Security
from colm.wire.v1 import common_pb2
from colm.wire.v1 import generation_service_pb2 as pb
from colm.wire.v1.generation_service_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server

LIMIT_S = 20.0
PIECE_BYTES = 256 << 10
DOCUMENT = "Grüße, 世界. " * 50_000  # some pieces, whose ends fall inside characters
CLIENTS = pytest.mark.parametrize("kind", ["blocking", "async"])


class Gateway(GenerationServiceServicer):
    """Reads each prompt to its end, answers with `finished`, and remembers what came and what was broken off."""

    def __init__(self) -> None:
        self.address = ""
        self.num_calls = 0
        self.num_answers = 0
        self.parts: list[str | None] = []
        self.opened = pb.OpenGenerate()
        self.document = bytearray()
        self.token_ids: list[int] = []
        self.has_begun = threading.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.num_dropped = 0
        """First calls that end without a word."""
        self._broken_off = asyncio.Event()

    async def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.num_calls += 1
        if self.num_calls <= self.num_dropped:
            await context.abort(grpc.StatusCode.CANCELLED)
        try:
            async for request in request_iterator:
                self.parts.append(request.WhichOneof("part"))
                if self.parts[-1] == "open":
                    self.opened = request.open
                self.document += request.document
                self.token_ids += request.token_ids.ids
                self.has_begun.set()
                if self.parts[-1] == "end_of_prompt":
                    break
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self._broken_off.set()
            raise
        self.num_answers += 1
        yield pb.GenerateResponse(finished=common_pb2.Finished(reason=common_pb2.FINISH_REASON_STOP))

    async def until_begun(self) -> None:
        assert await asyncio.to_thread(self.has_begun.wait, LIMIT_S)

    async def until_broken_off(self) -> None:
        async with asyncio.timeout(LIMIT_S):
            await self._broken_off.wait()


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    gateway = Gateway()
    server = create_server(Security())
    add_GenerationServiceServicer_to_server(gateway, server)
    gateway.address = f"127.0.0.1:{bind(server, '127.0.0.1', 0, Security())}"
    await server.start()
    try:
        yield gateway
    finally:
        await server.stop(0)


async def ask(kind: str, gateway: Gateway, **request: Any) -> list[Event]:
    """The events of one request, through a client of that kind."""

    def blocking() -> list[Event]:
        with Client(gateway.address) as client:
            return list(client.generate(**request))

    async with asyncio.timeout(LIMIT_S):
        if kind == "blocking":
            return await asyncio.to_thread(blocking)
        async with AsyncClient(gateway.address) as client:
            return [event async for event in client.generate(**request)]


class Source(io.RawIOBase):
    """A binary file that returns its pieces one by one; an exception among them is raised, a function is called."""

    def __init__(self, *pieces: Any) -> None:
        self._pieces = iter(pieces)

    def read(self, _: int = -1) -> Any:
        piece = next(self._pieces, b"")
        if isinstance(piece, BaseException):
            raise piece
        return piece() if callable(piece) else piece


def in_text_mode(path: Path) -> Any:
    (path / "text").write_text("abc")
    return (path / "text").open()


def wrapped_in_text_mode() -> Any:
    return tempfile.NamedTemporaryFile("w+")


def closed_file(path: Path) -> Any:
    with (path / "closed").open("wb+") as file:
        return file


DOCUMENTS: dict[str, Callable[[Path], Any]] = {
    "str": lambda _: DOCUMENT,
    "bytes": lambda _: DOCUMENT.encode(),
    "path": lambda path: path / "document",
    "file": lambda path: (path / "document").open("rb"),
    "memory": lambda _: io.BytesIO(DOCUMENT.encode()),
    "any object that reads": lambda _: Source(DOCUMENT.encode()[:1000], DOCUMENT.encode()[1000:]),
}


@CLIENTS
@pytest.mark.parametrize("form", DOCUMENTS)
async def test_a_document_arrives_whole_in_every_form(gateway: Gateway, tmp_path: Path, kind: str, form: str) -> None:
    (tmp_path / "document").write_bytes(DOCUMENT.encode())
    (event,) = await ask(kind, gateway, document=DOCUMENTS[form](tmp_path), prompt="?")
    assert isinstance(event, Finished)
    assert gateway.document == DOCUMENT.encode()
    assert gateway.num_calls == 1


@CLIENTS
async def test_an_empty_document_is_no_piece(gateway: Gateway, kind: str) -> None:
    await ask(kind, gateway, prompt="?")
    assert (gateway.document, gateway.opened.prompt) == (b"", "?")
    assert gateway.parts == ["open", "end_of_prompt"]


@CLIENTS
@pytest.mark.parametrize("prompt", [{"document": b"abc"}, {"token_ids": [1, 2]}], ids=lambda prompt: next(iter(prompt)))
async def test_the_end_of_the_prompt_is_the_last_message(gateway: Gateway, kind: str, prompt: dict[str, Any]) -> None:
    await ask(kind, gateway, **prompt)
    assert gateway.parts == ["open", *prompt, "end_of_prompt"]


TOKEN_IDS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "int64 array": np.array,
    "uint32 array": lambda ids: np.array(ids, dtype=np.uint32),
    "every other element of an array": lambda ids: np.repeat(np.array(ids), 2)[::2],
    "list of numpy's integers": lambda ids: list(np.array(ids)),
}


@CLIENTS
@pytest.mark.parametrize("form", TOKEN_IDS)
async def test_token_ids_arrive_from_any_sequence(gateway: Gateway, kind: str, form: str) -> None:
    ids = [0, (1 << 32) - 1, *range(1 << 16)]
    await ask(kind, gateway, token_ids=TOKEN_IDS[form](ids))
    assert gateway.token_ids == ids


@CLIENTS
async def test_options_arrive_whatever_kind_of_number_they_are(gateway: Gateway, kind: str) -> None:
    sampling = SamplingParams(temperature=1, top_k=np.int64(3), top_p=np.float32(0.5), stop=["x"])  # type: ignore[arg-type]
    await ask(
        kind,
        gateway,
        prompt="?",
        model="m",
        chat=False,
        num_chains=np.int32(2),
        max_new_tokens=7,
        timeout_s=60,
        sampling=sampling,
        attention="sparse",
        max_draft_tokens=np.int8(0),
    )
    sent = gateway.opened
    assert (sent.HasField("max_draft_tokens"), sent.max_draft_tokens) == (True, 0)
    assert sent.attention == common_pb2.ATTENTION_MODE_SPARSE
    assert (sent.model, sent.chat, sent.num_chains, sent.max_new_tokens, sent.timeout_s) == ("m", False, 2, 7, 60.0)
    assert (sent.sampling.temperature, sent.sampling.top_k, sent.sampling.top_p) == (1.0, 3, 0.5)
    assert list(sent.sampling.stop) == ["x"]


@CLIENTS
async def test_options_that_are_none_or_left_out_are_the_clusters_to_choose(gateway: Gateway, kind: str) -> None:
    await ask(kind, gateway, prompt="?", chat=None, num_chains=None, max_new_tokens=None)
    assert not any(gateway.opened.HasField(name) for name in ("chat", "num_chains", "max_new_tokens", "timeout_s"))


@CLIENTS
async def test_the_longest_timeout_is_the_servers_to_refuse(gateway: Gateway, kind: str) -> None:
    await ask(kind, gateway, prompt="?", timeout_s=1e300)
    assert gateway.opened.timeout_s == 1e300


BAD_REQUESTS: dict[str, tuple[Callable[[Path], dict[str, Any]], str, str]] = {
    "missing file": (lambda path: {"document": path / "nowhere"}, "document", "No such file"),
    "directory": (lambda path: {"document": path}, "document", "Is a directory"),
    "name too long": (lambda path: {"document": path / ("x" * 300)}, "document", "File name too long"),
    "impossible name": (lambda path: {"document": path / "a\0b"}, "document", "null byte"),
    "file in text mode": (lambda path: {"document": in_text_mode(path)}, "document", "binary"),
    "wrapped file in text mode": (lambda _: {"document": wrapped_in_text_mode()}, "document", "binary"),
    "text in memory": (lambda _: {"document": io.StringIO("abc")}, "document", "'abc'"),
    "closed file": (lambda path: {"document": closed_file(path)}, "document", "closed"),
    "file that is only written": (lambda path: {"document": (path / "w").open("wb")}, "document", "read"),
    "file that fails at once": (lambda _: {"document": Source(EOFError("cut off"))}, "document", "cut off"),
    "number as document": (lambda _: {"document": 5}, "document", "5"),
    "None as document": (lambda _: {"document": None}, "document", "None"),
    "surrogate in the document": (lambda _: {"document": "ab\ud800c"}, "document", r"\ud800"),
    "surrogate in the prompt": (lambda _: {"prompt": "ab\udfffc"}, "prompt", r"\udfff"),
    "bytes as prompt": (lambda _: {"prompt": b"abc"}, "prompt", "b'abc'"),
    "None as prompt": (lambda _: {"prompt": None}, "prompt", "None"),
    "surrogate in the model": (lambda _: {"model": "\ud800"}, "model", r"\ud800"),
    "None as model": (lambda _: {"model": None}, "model", "None"),
    "token id -1": (lambda _: {"token_ids": [5, -1]}, "token_ids", "-1"),
    "token id 2^32": (lambda _: {"token_ids": [5, 1 << 32]}, "token_ids", "4294967296"),
    "token id 10^5000": (lambda _: {"token_ids": [10**5000]}, "token_ids", "0x"),
    "token id of float": (lambda _: {"token_ids": [5, 6.0]}, "token_ids", "6.0"),
    "token id of bool": (lambda _: {"token_ids": [5, True]}, "token_ids", "True"),
    "token id of text": (lambda _: {"token_ids": [5, "6"]}, "token_ids", "'6'"),
    "array of floats": (lambda _: {"token_ids": np.array([5.5])}, "token_ids", "5.5"),
    "array of -1": (lambda _: {"token_ids": np.array([5, -1])}, "token_ids", "-1"),
    "array of rows": (lambda _: {"token_ids": np.array([[5, 6]])}, "token_ids", "[5, 6]"),
    "array of no dimension": (lambda _: {"token_ids": np.array(5)}, "token_ids", "5"),
    "text as token ids": (lambda _: {"token_ids": "56"}, "token_ids", "'56'"),
    "bytes as token ids": (lambda _: {"token_ids": b"56"}, "token_ids", "b'56'"),
    "None as token ids": (lambda _: {"token_ids": None}, "token_ids", "None"),
    "num_chains -1": (lambda _: {"num_chains": -1}, "num_chains", "-1"),
    "num_chains 2^32": (lambda _: {"num_chains": 1 << 32}, "num_chains", "4294967296"),
    "num_chains of numpy's -1": (lambda _: {"num_chains": np.int64(-1)}, "num_chains", "-1"),
    "num_chains of float": (lambda _: {"num_chains": 2.0}, "num_chains", "2.0"),
    "num_chains of bool": (lambda _: {"num_chains": True}, "num_chains", "True"),
    "max_new_tokens 2^63": (lambda _: {"max_new_tokens": 1 << 63}, "max_new_tokens", "9223372036854775808"),
    "max_new_tokens of float": (lambda _: {"max_new_tokens": 7.5}, "max_new_tokens", "7.5"),
    "max_new_tokens of bool": (lambda _: {"max_new_tokens": True}, "max_new_tokens", "True"),
    "timeout of text": (lambda _: {"timeout_s": "5"}, "timeout_s", "'5'"),
    "timeout of bool": (lambda _: {"timeout_s": True}, "timeout_s", "True"),
    "timeout NaN": (lambda _: {"timeout_s": float("nan")}, "timeout_s", "nan"),
    "timeout infinite": (lambda _: {"timeout_s": float("inf")}, "timeout_s", "inf"),
    "timeout 10^400": (lambda _: {"timeout_s": 10**400}, "timeout_s", "0x"),
    "chat of text": (lambda _: {"chat": "yes"}, "chat", "'yes'"),
    "chat of number": (lambda _: {"chat": 1}, "chat", "1"),
    "None as sampling": (lambda _: {"sampling": None}, "sampling", "None"),
    "attention unknown": (lambda _: {"attention": "quick"}, "attention", "'quick'"),
    "None as attention": (lambda _: {"attention": None}, "attention", "None"),
    "max_draft_tokens -1": (lambda _: {"max_draft_tokens": -1}, "max_draft_tokens", "-1"),
    "max_draft_tokens of bool": (lambda _: {"max_draft_tokens": True}, "max_draft_tokens", "True"),
    "dict as sampling": (lambda _: {"sampling": {"top_k": 1}}, "sampling", "top_k"),
    "option that does not exist": (lambda _: {"max_tokens": 5}, "max_tokens", "max_new_tokens"),
}


@CLIENTS
@pytest.mark.parametrize("case", BAD_REQUESTS)
async def test_bad_input_is_one_error_that_names_the_field_and_nothing_is_sent(
    gateway: Gateway, tmp_path: Path, kind: str, case: str
) -> None:
    """Bug: the async client ended with CancelledError, which a TaskGroup swallows; the blocking one blamed gRPC."""
    request, field, shown = BAD_REQUESTS[case]
    with pytest.raises(InvalidRequest) as refusal:
        await ask(kind, gateway, **{"prompt": "?", **request(tmp_path)})
    assert refusal.value.field == field
    assert refusal.value.limit
    assert shown in str(refusal.value)
    assert gateway.num_calls == 0


FAILING: dict[str, tuple[Any, str]] = {
    "disk": (OSError(5, "Input/output error"), "Input/output error"),
    "any error of the file's": (EOFError("cut off"), "cut off"),
    "text": ("text", "'text'"),
    "nothing to read yet": (None, "None"),
}


@CLIENTS
@pytest.mark.parametrize("case", FAILING)
async def test_a_file_that_fails_in_mid_read_is_one_error_and_cancels_the_call(
    gateway: Gateway, kind: str, case: str
) -> None:
    """Bug: errors other than OSError ended as CancelledError or as gRPC's "Exception iterating requests!"."""
    outcome, shown = FAILING[case]
    gateway.may_answer.clear()  # gRPC's server sees an upload that breaks off end first, and its call cancelled then

    def fail() -> Any:
        assert gateway.has_begun.wait(LIMIT_S)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with pytest.raises(InvalidRequest) as refusal:
        await ask(kind, gateway, document=Source(b"a" * PIECE_BYTES, b"b" * PIECE_BYTES, fail), prompt="?")
    assert refusal.value.field == "document"
    assert shown in str(refusal.value)
    await gateway.until_broken_off()
    assert gateway.num_answers == 0
    assert "end_of_prompt" not in gateway.parts


async def test_a_failed_upload_fails_its_task_group(gateway: Gateway) -> None:
    """Bug: a TaskGroup takes CancelledError for the task's own end and goes on."""
    with pytest.raises(ExceptionGroup) as failures:
        async with asyncio.TaskGroup() as group:
            group.create_task(ask("async", gateway, document=Source(b"a", OSError(5, "Input/output error"))))
    assert [type(error) for error in failures.value.exceptions] == [InvalidRequest]


async def test_the_async_client_reads_documents_outside_the_event_loop(gateway: Gateway) -> None:
    threads = []

    def piece() -> bytes:
        threads.append(threading.get_ident())
        return b"a"

    await ask("async", gateway, document=Source(piece, piece, piece), prompt="?")
    assert len(threads) == 3
    assert threading.get_ident() not in threads


@pytest.mark.parametrize(
    ("prompt", "is_in_thread"),
    [
        ({"document": "a" * SHORT_CHARS}, False),
        ({"document": "a" * (SHORT_CHARS + 1)}, True),
        ({"token_ids": [1] * SHORT_TOKENS}, False),
        ({"token_ids": [1] * (SHORT_TOKENS + 1)}, True),
    ],
)
async def test_the_async_client_makes_short_prompts_without_a_thread(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, prompt: dict[str, Any], is_in_thread: bool
) -> None:
    """Bug: each message of any prompt went to a thread and back, before the first token of a short one too."""
    works, to_thread = list[object](), asyncio.to_thread

    async def noted(work: Callable[..., Any], *args: object) -> object:
        works.append(work)
        return await to_thread(work, *args)

    monkeypatch.setattr(asyncio, "to_thread", noted)
    await ask("async", gateway, **prompt)
    assert bool(works) == is_in_thread


async def test_a_cancelled_task_is_cancelled_and_so_is_its_call(gateway: Gateway) -> None:
    gateway.may_answer.clear()
    task = asyncio.create_task(ask("async", gateway, prompt="?"))
    await gateway.until_begun()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gateway.until_broken_off()


async def test_a_timeout_around_an_answer_is_a_timeout(gateway: Gateway) -> None:
    gateway.may_answer.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await ask("async", gateway, prompt="?")


async def test_leaving_an_answer_early_cancels_the_call(gateway: Gateway) -> None:
    gateway.may_answer.clear()
    async with AsyncClient(gateway.address) as client, aclosing(client.generate(prompt="?")) as events:
        first = asyncio.ensure_future(anext(events))
        await gateway.until_begun()
        first.cancel()
        await asyncio.wait([first])
        await gateway.until_broken_off()


@CLIENTS
async def test_closing_the_client_ends_a_running_call_with_an_error(gateway: Gateway, kind: str) -> None:
    """Bug: the async client's reader, whom nobody had cancelled, got CancelledError."""
    gateway.may_answer.clear()
    client = Client(gateway.address) if kind == "blocking" else AsyncClient(gateway.address)

    async def read() -> None:
        if isinstance(client, Client):
            await asyncio.to_thread(list, client.generate(prompt="?"))
        else:
            async for _ in client.generate(prompt="?"):
                pass

    reading = asyncio.create_task(read())
    await gateway.until_begun()
    if isinstance(client, Client):
        client.close()
    else:
        await client.close()
    with pytest.raises(PeerUnavailable):
        await reading


@CLIENTS
async def test_a_call_that_a_stopping_gateway_has_not_taken_is_made_again(gateway: Gateway, kind: str) -> None:
    """Bug: gRPC's server drops such calls as it stops, and their CANCELLED seemed to be the gateway's last word."""
    gateway.num_dropped = 1
    events = await ask(kind, gateway, document=DOCUMENT)
    assert [type(event) for event in events] == [Reconnecting, Finished]
    assert gateway.document.decode() == DOCUMENT
