"""Spans of a request's way: across processes, into files, and out of them again."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from httpx2 import AsyncClient
from typer.testing import CliRunner

from cluster.cli import app
from cluster.cli.trace_view import Span, in_order, read_spans
from colm import tracing
from colm.checkpoint import Checkpoint
from colm.errors import ConfigError, InvalidRequest
from tests.gateway import TakingTurns, http_gateway
from tests.nodes import decode, decode_node, prefill_node
from tests.tiny import tiny_checkpoint

PROMPT = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def recorded(tmp_path: Path) -> Iterator[Callable[[], list[Span]]]:
    """Records in this process; the function ends that, and returns the spans of the one trace."""
    end = tracing.trace_to(tracing.TraceFiles(folder=str(tmp_path / "t"), share=1.0), "test")

    def spans() -> list[Span]:
        end()
        (found,) = read_spans(tmp_path / "t").values()
        return found

    yield spans
    end()


def tree(spans: list[Span]) -> list[tuple[int, str]]:
    return [(depth, span.name) for depth, span in in_order(spans)]


def test_without_files_nothing_is_recorded_and_nothing_sent() -> None:
    with tracing.span("a", x=1) as note:
        note(y=2)
        assert tracing.headers() == ()
        assert tracing.trace_id() == ""


def test_a_span_has_its_parent_its_facts_and_the_name_of_its_error(recorded: Callable[[], list[Span]]) -> None:
    def fail() -> None:
        with tracing.span("outer", chains=2):
            with tracing.span("first") as note:
                note(tokens=7, share=0.5, is_last=True)
            with tracing.span("second"):
                raise InvalidRequest("prompt", "a secret", "must not be told")

    with pytest.raises(InvalidRequest):
        fail()
    spans = recorded()
    assert tree(spans) == [(0, "outer"), (1, "first"), (1, "second")]
    assert [span.error for span in spans] == ["InvalidRequest", "", "InvalidRequest"]
    assert spans[1].facts == {"tokens": "7", "share": "0.5", "is_last": "True"}
    assert "secret" not in str(spans)
    assert all(span.began_ns <= span.ended_ns and span.process == "test" for span in spans)


def test_a_call_goes_on_with_its_callers_trace_and_a_word_that_is_none_begins_another(
    recorded: Callable[[], list[Span]],
) -> None:
    with tracing.span("caller"):
        sent, caller = tracing.headers(), tracing.trace_id()
    with tracing.continued(sent), tracing.span("callee"):
        assert tracing.trace_id() == caller
    with tracing.continued([("traceparent", "nonsense")]), tracing.span("alone"):
        assert tracing.trace_id() not in ("", caller)
    with pytest.raises(ValueError, match="too many values"):
        recorded()


def test_a_share_of_none_still_records_what_a_caller_records(tmp_path: Path) -> None:
    end = tracing.trace_to(tracing.TraceFiles(folder=str(tmp_path), share=0.0), "test")
    with tracing.span("not"):
        assert tracing.trace_id() == ""
    with tracing.continued([("traceparent", f"00-{'ab' * 16}-{'cd' * 8}-01")]), tracing.span("yes"):
        assert tracing.trace_id() == "ab" * 16
    end()
    (spans,) = read_spans(tmp_path).values()
    assert [(span.name, span.parent_id) for span in spans] == [("yes", "cd" * 8)]


async def test_one_trace_leads_through_both_nodes(
    checkpoint: Checkpoint, recorded: Callable[[], list[Span]], caplog: pytest.LogCaptureFixture
) -> None:
    path = str(checkpoint.path)
    caplog.set_level(logging.INFO)
    async with prefill_node(path) as prefill, decode_node(path, [prefill.address]) as node:
        with tracing.span("client"):
            trace = tracing.trace_id()
            await decode(node.address, PROMPT, num_chains=2, max_new_tokens=3)
    spans = recorded()
    assert tree(spans) == [
        (0, "client"),
        (1, "decode"),
        (2, "reserve_pages"),
        (2, "fetch_kv"),
        (3, "prefill"),
        (4, "wait_for_engine"),
        (2, "answer"),
    ]
    facts = {span.name: span.facts for span in spans}
    assert facts["answer"]["tokens"] == "3"
    assert facts["prefill"]["tokens"] == "149"
    assert int(facts["prefill"]["kv_bytes"]) > 0
    reserved = next(line for line in caplog.messages if line.startswith("request.reserved"))
    assert reserved.endswith(f" trace={trace}")


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_call_over_http_is_one_trace_and_its_client_is_told(
    checkpoint: Checkpoint, recorded: Callable[[], list[Span]], is_streamed: bool
) -> None:
    path, body = str(checkpoint.path), {"model": "tiny", "prompt": PROMPT, "max_tokens": 2, "n": 2}
    trace = "ab" * 16
    async with (
        prefill_node(path) as prefill,
        decode_node(path, [prefill.address]) as node,
        http_gateway(checkpoint.config, TakingTurns([node.address])) as address,
        AsyncClient() as client,
    ):
        answer = await client.post(
            f"http://{address}/v1/completions",
            json=body | {"stream": is_streamed},
            headers={"traceparent": f"00-{trace}-{'cd' * 8}-01"},
        )
    assert (answer.status_code, answer.headers["x-trace-id"]) == (200, trace)
    found = tree(recorded())
    assert found[:2] == [(0, "openai"), (1, "generate")]
    assert [name for depth, name in found if depth == 1] == ["generate", "generate"]
    assert {name for depth, name in found if depth == 2} == {"read_prompt", "decode"}


def test_the_command_lists_traces_and_draws_one(tmp_path: Path) -> None:
    end = tracing.trace_to(tracing.TraceFiles(folder=str(tmp_path), share=1.0), "gateway")
    with tracing.span("generate", request="r1"), tracing.span("read_prompt"):
        trace = tracing.trace_id()
    end()
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    with file.open("a") as lines:
        lines.write('{"resourceSp')  # a process that was killed while it wrote
    runner = CliRunner(env={"COLUMNS": "160"})
    listed = runner.invoke(app, ["trace", str(tmp_path)])
    assert trace in listed.stdout
    assert "request=r1" in listed.stdout
    drawn = runner.invoke(app, ["trace", str(tmp_path), trace[:8]]).stdout
    assert "  read_prompt" in drawn
    record = json.loads(runner.invoke(app, ["trace", str(tmp_path), trace, "--json"]).stdout)
    assert [span["name"] for span in record["spans"]] == ["generate", "read_prompt"]
    refused = runner.invoke(app, ["trace", str(tmp_path), "zz"]).exception
    assert isinstance(refused, ConfigError)
    assert "none of the 1 recorded" in str(refused)
