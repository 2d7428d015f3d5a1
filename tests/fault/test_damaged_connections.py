"""Bytes between decode node and prefill node that are lost, late, changed or twice there, at any place of a connection.

The answer is the undisturbed one, or there is one typed error; and nothing is left behind. The places are drawn from a
seed; COLM_FAULTS=N draws N times as many.
"""

import os
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc
import pytest
import torch

from colm.checkpoint import Checkpoint
from colm.errors import ColmError
from colm.wire import endpoint, prompt_stream
from colm.wire.endpoint import Keepalive
from colm.wire.security import Security, new_tls, new_token
from colm.wire.status import error_of
from decode_node import node as node_module
from decode_node.kv_fetch import RetryPolicy
from decode_node.node import DecodeNode
from prefill_node.node import PrefillNode
from tests.leaks import nothing_left
from tests.nodes import Answer, decode, decode_node, prefill_node, until_idle, until_prefill_idle
from tests.relay import ByteFault, Mishap, Relay, relay
from tests.tiny import tiny_checkpoint

PROMPT = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(1)).tolist()
NUM_PLACES = 3 * int(os.environ.get("COLM_FAULTS", "1"))
FROM_SERVER_BYTES, TO_SERVER_BYTES = 77_000, 740
"""What an undisturbed connection carries at least, in plaintext; with TLS some thousands more."""
SECURE = Security(token=new_token(), tls=new_tls())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "RetryPolicy", lambda: RetryPolicy(first_pause_s=0.001, last_pause_s=0.01))
    monkeypatch.setattr(endpoint, "KEEPALIVE", Keepalive(interval_ms=500, timeout_ms=1_500))
    monkeypatch.setattr(endpoint, "HANDSHAKE_MS", 1_000)
    monkeypatch.setattr(prompt_stream, "UPLOAD_IDLE_S", 2.0)


@asynccontextmanager
async def ends(checkpoint: Checkpoint, *, is_secure: bool) -> AsyncIterator[tuple[PrefillNode, Relay, DecodeNode]]:
    """Both nodes and the relay between them, of which nothing may be left."""
    path = str(checkpoint.path)
    security = SECURE if is_secure else Security()
    async with (
        nothing_left(),
        prefill_node(path, security, job_lease_s=0.1) as prefill,
        relay(prefill.address) as line,
        decode_node(path, [line.address], security) as node,
    ):
        yield prefill, line, node
        await until_prefill_idle(prefill)


async def outcome(node: DecodeNode, *, is_secure: bool = False) -> Answer | ColmError:
    try:
        return await decode(node.address, PROMPT, security=SECURE if is_secure else Security(), num_chains=3)
    except grpc.aio.AioRpcError as err:
        return error_of(err, "decode node")
    finally:
        await until_idle(node)


def faults(draw: random.Random, *, is_from_server: bool, num_bytes: int) -> Iterator[ByteFault]:
    """Each mishap at a few places, half of them near the beginning, where the connection and the call are set up."""
    for mishap in Mishap:
        # Silence is noticed by a ping that is not answered: the only fault that takes time.
        for number in range(1 if mishap is Mishap.STALL else NUM_PLACES):
            yield ByteFault(
                mishap=mishap,
                at_byte=draw.randrange(num_bytes if number % 2 else min(num_bytes, 1200)),
                num_bytes=draw.choice([1, 1, 3, 9, 64]),
                is_from_server=is_from_server,
                delay_s=0.02,
            )


SIDES = pytest.mark.parametrize("is_from_server", [True, False], ids=["tiles", "requests"])


@SIDES
@pytest.mark.parametrize("is_secure", [True, False], ids=["tls", "plaintext"])
async def test_the_answer_is_right_or_there_is_one_typed_error_and_nothing_is_left(
    checkpoint: Checkpoint, is_secure: bool, is_from_server: bool
) -> None:
    """Bug: ids of the prompt were taken as they came, and the answer to another prompt was given in plaintext.

    Bug: a connection whose header table was damaged was used for all eight attempts.

    Bug: in plaintext a request that came as another one was refused for what it said, and not sent again.
    """
    async with ends(checkpoint, is_secure=is_secure) as (_, line, node):
        undisturbed = await outcome(node, is_secure=is_secure)
        assert isinstance(undisturbed, Answer)
        num_bytes = FROM_SERVER_BYTES if is_from_server else TO_SERVER_BYTES + 1500 * is_secure
        num_faults = 0
        for fault in faults(random.Random(7), is_from_server=is_from_server, num_bytes=num_bytes):
            await line.break_off()
            line.fault, num_faults = fault, num_faults + 1
            got = await outcome(node, is_secure=is_secure)
            if isinstance(got, Answer):
                assert (got.token_ids, got.logprobs) == (undisturbed.token_ids, undisturbed.logprobs), fault
                assert got.usage.kv_received_bytes == undisturbed.usage.kv_received_bytes, fault
                assert got.usage.num_decode_prompt_tokens == 1, fault
            else:
                pytest.fail(f"{fault} ended the request: {got}")
        assert line.num_spoilt >= num_faults * 3 // 4


async def test_ids_that_change_on_the_way_are_asked_for_again(checkpoint: Checkpoint) -> None:
    """Bug: a bit of the prompt that flipped on the way to the prefill node gave the answer to another prompt."""
    async with ends(checkpoint, is_secure=False) as (_, line, node):
        undisturbed = await outcome(node)
        assert isinstance(undisturbed, Answer)
        num_streams = set()
        for at_byte in range(600, 800, 50):  # the ids lie there, two bytes each
            await line.break_off()
            line.fault = ByteFault(mishap=Mishap.FLIP, at_byte=at_byte, is_from_server=False)
            got = await outcome(node)
            assert isinstance(got, Answer), got
            assert got.token_ids == undisturbed.token_ids
            assert got.usage.kv_received_bytes == undisturbed.usage.kv_received_bytes
            num_streams.add(got.usage.num_kv_streams)
        assert 2 in num_streams


async def test_a_relay_that_damages_nothing_is_not_noticed(checkpoint: Checkpoint) -> None:
    async with ends(checkpoint, is_secure=True) as (_, line, node):
        got = await outcome(node, is_secure=True)
        assert isinstance(got, Answer)
        assert (got.usage.num_kv_streams, line.num_accepted, line.num_spoilt) == (1, 1, 0)
