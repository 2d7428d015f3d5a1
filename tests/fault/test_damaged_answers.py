"""Bytes between gateway and decode node that change in plaintext: the same answer, or one typed error."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from colm.checkpoint import Checkpoint
from colm.client import AsyncClient
from colm.errors import ColmError, PeerFailed, PeerUnavailable
from colm.events import Accepted, Event, Token
from colm.sampling import SamplingParams
from colm.wire import endpoint, prompt_stream
from colm.wire.endpoint import Keepalive
from tests.gateway import TakingTurns, killable_gateway
from tests.nodes import decode_node, prefill_node
from tests.relay import ByteFault, Mishap, Relay, relay
from tests.tiny import tiny_checkpoint, tiny_config

OPTIONS: dict[str, Any] = {
    "token_ids": list(range(5, 25)),
    "max_new_tokens": 12,
    "sampling": SamplingParams(ignore_eos=True, temperature=1.3, top_p=0.9, seed=11, top_logprobs=2),
    "num_chains": 2,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tiny_config(vocab_size=270))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "KEEPALIVE", Keepalive(interval_ms=200, timeout_ms=400))
    monkeypatch.setattr(endpoint, "HANDSHAKE_MS", 1_000)
    monkeypatch.setattr(prompt_stream, "UPLOAD_IDLE_S", 2.0)


@pytest.fixture
async def line(checkpoint: Checkpoint) -> AsyncIterator[Relay]:
    """Before a decode node."""
    path = str(checkpoint.path)
    async with (
        prefill_node(path) as prefill,
        decode_node(path, [prefill.address]) as node,
        relay(node.address) as standing,
    ):
        yield standing


async def ask(address: str) -> list[Event] | ColmError:
    async with AsyncClient(address) as client:
        try:
            return [event async for event in client.generate(**OPTIONS)]
        except ColmError as err:
            return err


def told(events: list[Event] | ColmError) -> object:
    """What must not change: what was accepted, and every token with its numbers."""
    if isinstance(events, ColmError):
        return type(events)
    said = [(each.num_chains, each.max_new_tokens) for each in events if isinstance(each, Accepted)]
    return said, [each for each in events if isinstance(each, Token)]


@pytest.mark.parametrize("is_from_server", [True, False], ids=["answer", "request"])
async def test_an_answer_is_the_undisturbed_one_whatever_byte_changes(
    checkpoint: Checkpoint, line: Relay, is_from_server: bool
) -> None:
    """Bug: a bit that flipped in plaintext in the sampling or in a token gave another answer."""
    num_right = num_faults = 0
    async with killable_gateway(checkpoint.config, TakingTurns([line.address])) as gateway:
        undisturbed = told(await ask(gateway.address))
        for at_byte in range(
            120 if is_from_server else 280, 1000 if is_from_server else 440, 41 if is_from_server else 13
        ):
            await line.break_off()
            line.fault = ByteFault(
                mishap=Mishap.FLIP, at_byte=at_byte, num_bytes=1 + at_byte % 2, is_from_server=is_from_server
            )
            num_faults += 1
            got = told(await ask(gateway.address))
            num_right += got == undisturbed
            assert got in (undisturbed, PeerUnavailable, PeerFailed), at_byte
    assert line.num_spoilt > num_faults * 3 // 4
    assert num_right > num_faults * 3 // 4
