"""A document goes in over gRPC, tokens come out: through gateway, decode replica and prefill replica, on Ray."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from cluster.cli.trace_view import read_spans
from cluster.state import ClusterState
from colm.checkpoint import Checkpoint
from colm.client import Answer, AsyncClient, Client, collect
from colm.errors import ColmError, InvalidRequest, PeerUnavailable, Unauthenticated
from colm.events import Accepted, Finished, FinishReason, PrefillProgress, Token
from colm.kv import KvFormat
from colm.model import ChainTransformer
from colm.request import KV_CODECS, KvCodec
from colm.sampling import SamplingParams
from colm.text.tokenizer import Tokenizer
from colm.wire.endpoint import open_blocking_channel
from colm.wire.kv_codec import wire_token_bytes
from colm.wire.security import Security
from tests.e2e.conftest import RunningCluster, last_json, run_colm, until
from tests.oracle import assert_greedy

DOCUMENT = topics["with"]
PROMPT = "What does the with statement do?"


@pytest.fixture(scope="module")
def oracle(expanded_checkpoint: Checkpoint) -> ChainTransformer:
    return expanded_checkpoint.load(dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(expanded_checkpoint: Checkpoint) -> Tokenizer:
    tokenizer = Tokenizer.load(expanded_checkpoint)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture
def client(cluster: RunningCluster) -> Client:
    with cluster.client() as client:
        yield client
    cluster.assert_idle()


def ids_of(answer: Answer) -> list[int]:
    return [token.token_id for token in answer.tokens]


@pytest.mark.parametrize("num_chains", [1, 2])
def test_greedy_answer_is_the_oracles_token_for_token(
    client: Client, oracle: ChainTransformer, tokenizer: Tokenizer, num_chains: int
) -> None:
    answer = collect(client.generate(DOCUMENT, PROMPT, num_chains=num_chains, max_new_tokens=24))
    prompt = tokenizer.encode_prompt(document=DOCUMENT, prompt=PROMPT, chat=True).tolist()
    assert_greedy(oracle, prompt, ids_of(answer), num_chains)
    assert answer.text == tokenizer.decode(ids_of(answer))


@pytest.mark.parametrize("kv_codec", KV_CODECS)
def test_events_and_usage_account_for_every_token_and_byte(
    client: Client, tokenizer: Tokenizer, expanded_checkpoint: Checkpoint, kv_codec: KvCodec
) -> None:
    events = list(client.generate(DOCUMENT, PROMPT, max_new_tokens=8, kv_codec=kv_codec))
    prompt = tokenizer.encode_prompt(document=DOCUMENT, prompt=PROMPT, chat=True)
    accepted, finished = events[0], events[-1]
    assert isinstance(accepted, Accepted)
    assert isinstance(finished, Finished)
    assert accepted.num_prompt_tokens == len(prompt)
    progress = [event for event in events if isinstance(event, PrefillProgress)]
    assert progress[-1].num_tokens_done == progress[-1].num_tokens_total == len(prompt) - 1
    assert [p.num_tokens_done for p in progress] == sorted(p.num_tokens_done for p in progress)
    kv_format = KvFormat.of(expanded_checkpoint.config, torch.float32)
    usage = finished.usage
    assert usage.num_prefill_tokens == len(prompt) - 1
    assert usage.num_decode_prompt_tokens == 1
    num_rows = (len(prompt) - 1) * kv_format.num_layers
    assert usage.kv_received_bytes == num_rows * wire_token_bytes(kv_format, kv_codec)
    assert usage.kv_effective_bytes == num_rows * kv_format.layer_token_bytes
    assert usage.num_new_tokens == len([event for event in events if isinstance(event, Token)]) == 8
    assert finished.reason is FinishReason.LENGTH


def test_untrained_later_chains_change_nothing(client: Client) -> None:
    answers = [collect(client.generate(DOCUMENT, PROMPT, num_chains=n, max_new_tokens=16)) for n in (1, 2)]
    assert ids_of(answers[0]) == ids_of(answers[1])
    assert [t.logprob for t in answers[0].tokens] == pytest.approx([t.logprob for t in answers[1].tokens], abs=1e-3)
    assert {t.num_chains for t in answers[1].tokens} == {2}


def test_requests_at_once_are_answered_as_if_each_were_alone(client: Client) -> None:
    requests = [(f"Count from {i}: {i}, {i + 1},", 1 + i % 2) for i in range(6)]

    def ask(request: tuple[str, int]) -> list[int]:
        prompt, num_chains = request
        return ids_of(collect(client.generate("", prompt, chat=False, num_chains=num_chains, max_new_tokens=12)))

    alone = [ask(request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as threads:
        assert list(threads.map(ask, requests)) == alone


def test_a_seed_fixes_a_sampled_answer_and_another_seed_changes_it(client: Client) -> None:
    def ask(seed: int) -> list[int]:
        sampling = SamplingParams(temperature=1.5, top_k=200, top_p=0.95, seed=seed)
        return ids_of(collect(client.generate("", "Once upon a time", sampling=sampling, max_new_tokens=16)))

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)


def test_stop_string_ends_the_answer_before_it(client: Client) -> None:
    whole = collect(client.generate("", "1, 2, 3, 4,", chat=False, max_new_tokens=24))
    stop = whole.text[9:12]
    answer = collect(
        client.generate("", "1, 2, 3, 4,", chat=False, max_new_tokens=24, sampling=SamplingParams(stop=(stop,)))
    )
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.finished.reason is FinishReason.STOP


def test_stop_id_ends_the_answer_and_alternatives_come_likeliest_first(client: Client) -> None:
    whole = collect(
        client.generate("", "1, 2, 3, 4,", chat=False, max_new_tokens=8, sampling=SamplingParams(top_logprobs=3))
    )
    for token in whole.tokens:
        assert [logprob for _, logprob in token.top_logprobs] == sorted(
            (logprob for _, logprob in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0] == (token.token_id, token.logprob)
    stop_id = ids_of(whole)[3]
    answer = collect(
        client.generate(
            "", "1, 2, 3, 4,", chat=False, max_new_tokens=8, sampling=SamplingParams(stop_token_ids=(stop_id,))
        )
    )
    assert ids_of(answer) == ids_of(whole)[: ids_of(whole).index(stop_id) + 1]
    assert answer.finished.reason is FinishReason.STOP


def test_a_prompt_of_token_ids_equals_its_text(client: Client, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode_prompt(document="", prompt="Hello there.", chat=True)
    by_ids = collect(client.generate(token_ids=prompt, max_new_tokens=8))
    by_text = collect(client.generate("", "Hello there.", max_new_tokens=8))
    assert ids_of(by_ids) == ids_of(by_text)


async def test_the_async_client_gives_the_same_answer(cluster: RunningCluster, client: Client) -> None:
    async with AsyncClient(cluster.state.gateway_address, cluster.state.security) as async_client:
        events = [event async for event in async_client.generate("", "Hello there.", max_new_tokens=8)]
    tokens = [event.token_id for event in events if isinstance(event, Token)]
    assert tokens == ids_of(collect(client.generate("", "Hello there.", max_new_tokens=8)))


BAD_REQUESTS = {
    "empty prompt": ({"document": "", "prompt": ""}, "prompt", "empty"),
    "over the context": ({"document": "word " * 20_000, "prompt": "?"}, "document", "context of 8192"),
    "broken UTF-8": ({"document": b"abc\xff\xfedef", "prompt": "?"}, "document", "byte 3"),
    "document over the size": ({"document": b" " * (7 << 20), "prompt": "?"}, "document", "at most 6291456 bytes"),
    "unknown model": ({"document": "", "prompt": "?", "model": "gpt"}, "model", "SmolLM2-135M-Instruct-9-3"),
    "num_chains 0": ({"document": "", "prompt": "?", "num_chains": 0}, "num_chains", "between 1 and 2"),
    "num_chains 3": ({"document": "", "prompt": "?", "num_chains": 3}, "num_chains", "between 1 and 2"),
    "num_chains negative": ({"document": "", "prompt": "?", "num_chains": -1}, "num_chains", "-1"),
    "max_new_tokens 0": ({"document": "", "prompt": "?", "max_new_tokens": 0}, "max_new_tokens", "between 1 and"),
    "max_new_tokens negative": ({"document": "", "prompt": "?", "max_new_tokens": -5}, "max_new_tokens", "16384"),
    "max_new_tokens huge": ({"document": "", "prompt": "?", "max_new_tokens": 10**9}, "max_new_tokens", "16384"),
    "token id outside": ({"token_ids": [1, 2, 49152]}, "token_ids", "49152"),
    "ids and text": ({"token_ids": [1, 2], "prompt": "?"}, "token_ids", "not both"),
    "timeout too long": ({"document": "", "prompt": "?", "timeout_s": 1e9}, "timeout_s", "at most"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_input_is_one_clear_error_that_names_the_field(client: Client, case: str) -> None:
    request, field, limit = BAD_REQUESTS[case]
    with pytest.raises(InvalidRequest) as caught:
        collect(client.generate(**request))  # type: ignore[arg-type]
    assert caught.value.field == field
    assert limit in str(caught.value)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0])
def test_a_deadline_already_past_is_refused_by_name(client: Client, timeout_s: float) -> None:
    with pytest.raises(ColmError, match="timeout_s"):
        collect(client.generate("", "?", timeout_s=timeout_s))


def test_an_answer_that_outlives_its_deadline_ends_with_one_error(client: Client) -> None:
    with pytest.raises(ColmError, match=r"timeout_s=0\.5"):
        collect(client.generate(DOCUMENT * 5, PROMPT, timeout_s=0.5))


def test_a_document_larger_than_a_grpc_message_is_uploaded_in_pieces(client: Client) -> None:
    """The refusal is about tokens, so all five MiB have passed gRPC's own limit of four.

    The document is of spaces, which a template might trim: other text of that length is refused before it has arrived.
    """
    with pytest.raises(InvalidRequest, match=r"over [0-9]+ prompt tokens"):
        collect(client.generate(" " * (5 << 20), "?"))


def test_a_document_beyond_the_context_is_refused_by_its_bytes(client: Client) -> None:
    with pytest.raises(InvalidRequest, match=r"document='over [0-9]+ bytes'.*must fit the model's context"):
        collect(client.generate("a b c d " * (5 << 17), "?"))


@pytest.mark.parametrize("token", [None, "wrong"])
def test_nobody_gets_in_without_the_token(cluster: RunningCluster, token: str | None) -> None:
    security = Security(token=token, tls=cluster.state.security.tls)
    with Client(cluster.state.gateway_address, security) as stranger, pytest.raises(Unauthenticated):
        collect(stranger.generate("", "?"))


def test_nobody_gets_in_without_tls(cluster: RunningCluster) -> None:
    plain = Security(token=cluster.state.client_token)
    with Client(cluster.state.gateway_address, plain) as stranger, pytest.raises(PeerUnavailable):
        collect(stranger.generate("", "?"))


def test_health_and_reflection(cluster: RunningCluster) -> None:
    security = cluster.state.security
    with open_blocking_channel(cluster.state.gateway_address, Security(tls=security.tls)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "colm.wire.v1.GenerationService"):
            status = health.Check(health_pb2.HealthCheckRequest(service=service)).status
            assert status == health_pb2.HealthCheckResponse.SERVING

    class WithToken(grpc.StreamStreamClientInterceptor):
        def intercept_stream_stream(self, continuation, details, requests):  # type: ignore[no-untyped-def]
            return continuation(details._replace(metadata=security.metadata()), requests)

    with open_blocking_channel(cluster.state.gateway_address, security) as channel:
        database = ProtoReflectionDescriptorDatabase(grpc.intercept_channel(channel, WithToken()))
        assert "colm.wire.v1.GenerationService" in database.get_services()


def test_status_shows_roles_addresses_and_load(cluster: RunningCluster) -> None:
    record = last_json(cluster.colm("status", "--json").stdout)
    assert [model["name"] for model in record["models"]] == ["SmolLM2-135M-Instruct-9-3"]
    assert sorted(node["role"] for node in record["nodes"]) == ["decode", "prefill"]
    assert all(node["address"] and node["resident_bytes"] > 0 for node in record["nodes"])
    table = cluster.colm("status").stdout
    assert "prefill" in table
    assert "SmolLM2" in table


def test_top_reads_every_process(cluster: RunningCluster) -> None:
    seen = last_json(cluster.colm("top", "--looks", "1", "--interval", "0.2", "--json").stdout)
    assert seen["unread"] == []
    assert [node["busy"] is not None for node in (*seen["prefill"], *seen["decode"])] == [True, True]
    assert seen["gateway"]["requests_per_s"] is not None


def test_a_trace_leads_through_every_process(cluster: RunningCluster, tmp_path: Path) -> None:
    document = tmp_path / "document.txt"
    document.write_text(DOCUMENT)
    done = cluster.colm("submit", str(document), "--prompt", PROMPT, "--max-new-tokens", "4", "--json")
    folder, trace_id = cluster.state_dir.parent / "traces", last_json(done.stdout)["trace_id"]

    def processes() -> set[str]:
        return {span.process for span in read_spans(folder).get(trace_id, [])}

    until(lambda: processes() == {"gateway", "decode", "prefill"}, 60, lambda: f"only {processes()} recorded")
    assert "wait_for_engine" in cluster.colm("trace", str(folder), trace_id).stdout


def test_submit_asks_for_sparse_attention_and_a_short_document_is_dense_all_the_same(
    cluster: RunningCluster, expanded_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    document = tmp_path / "document.txt"
    document.write_text(DOCUMENT)
    words = ("submit", str(document), "--prompt", PROMPT, "--max-new-tokens", "4", "--json")
    dense, sparse = (last_json(cluster.colm(*words, "--attention", mode).stdout) for mode in ("dense", "sparse"))
    assert sparse["text"] == dense["text"]
    assert "sparse_layers" not in dense
    assert [layer["recall"] for layer in sparse["sparse_layers"]] == [1.0] * (expanded_checkpoint.config.num_layers - 1)


def test_submit_prints_the_answer_or_one_json_object(cluster: RunningCluster, tmp_path: Path) -> None:
    document = tmp_path / "document.txt"
    document.write_text(DOCUMENT)
    words = ("submit", str(document), "--prompt", PROMPT, "--max-new-tokens", "12", "--chains", "1")
    plain, record = cluster.colm(*words), last_json(cluster.colm(*words, "--json").stdout)
    assert record["text"] in plain.stdout
    assert record["num_chains"] == 1
    assert record["decode_prompt_tokens"] == 1
    assert record["new_tokens"] == 12
    refused = cluster.colm("submit", str(document), "--chains", "5", check=False)
    assert refused.returncode == 1
    assert "num_chains" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_up_on_a_taken_port_says_so_in_one_line_and_leaves_nothing(
    cluster: RunningCluster, expanded_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    taken = cluster.state.gateway_address.rpartition(":")[2]
    words = ("up", "--model", str(expanded_checkpoint.path), "--port", taken)
    refused = run_colm(tmp_path / "other", *words, check=False)
    assert refused.returncode == 1
    (error,) = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert f"gateway.port={taken}: port {taken} is taken" in error
    assert "Traceback" not in refused.stderr
    assert ClusterState.read(tmp_path / "other") is None


def test_a_second_up_is_refused_while_one_is_up(cluster: RunningCluster, expanded_checkpoint: Checkpoint) -> None:
    refused = cluster.colm("up", "--model", str(expanded_checkpoint.path), check=False)
    assert refused.returncode == 1
    assert "colm down" in refused.stderr


def test_openais_own_client_is_pointed_at_the_cluster_by_its_environment(
    cluster: RunningCluster,
) -> None:
    exports = (line.removeprefix("export ").split("=", 1) for line in cluster.colm("env").stdout.splitlines())
    program = """
import json, sys
from openai import OpenAI
client, question = OpenAI(), [{"role": "user", "content": sys.argv[2]}]
book = client.files.create(file=open(sys.argv[1], "rb"), purpose="user_data")
stream = client.chat.completions.create(
    model=client.models.list().data[0].id, messages=question, temperature=0, max_tokens=12, stream=True, logprobs=True,
    extra_body={"document": book.id, "scale": 2},
)
chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
print(json.dumps({"text": "".join(chunk.delta.content or "" for chunk in chunks), "end": chunks[-1].finish_reason}))
"""
    document = cluster.state_dir / "document.txt"
    document.write_text(DOCUMENT)
    done = subprocess.run(
        [sys.executable, "-c", program, str(document), PROMPT],
        env=os.environ | dict(exports),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with cluster.client() as client:
        answer = collect(client.generate(DOCUMENT, PROMPT, num_chains=2, max_new_tokens=12))
    assert last_json(done.stdout) == {"text": answer.text, "end": "length"}
    cluster.assert_idle()
