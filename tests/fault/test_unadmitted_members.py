"""Members of a cluster that do not admit each other: no fault of the client's, and passed over where one is free."""

import dataclasses
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from cluster.front_door.placement import DecodeLease
from colm.checkpoint import Checkpoint
from colm.client import AsyncClient
from colm.errors import ColmError, PeerUnavailable, PrefillUnavailable
from colm.events import Event, Finished
from colm.line import Beat
from colm.sampling import SamplingParams
from colm.wire.authority import Authority
from colm.wire.members import Member
from colm.wire.security import Security, new_tls
from decode_node.node import DecodeNode
from tests.gateway import RETRY, TakingTurns, killable_gateway
from tests.nodes import decode_node, prefill_node
from tests.tiny import tiny_checkpoint, tiny_config

AUTHORITY = Authority.new(datetime.now(UTC))
OPTIONS: dict[str, Any] = {
    "token_ids": list(range(5, 65)),
    "max_new_tokens": 4,
    "sampling": SamplingParams(ignore_eos=True),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tiny_config(vocab_size=270))


class IdlestFirst(TakingTurns):
    """As Serve lends: a node that refuses has nothing to do, so it would be lent again."""

    @asynccontextmanager
    async def lease(self, *, beat: Beat, refused_by: Collection[str] = ()) -> AsyncIterator[DecodeLease]:
        (first, *_) = [address for address in self._addresses if address not in refused_by] or self._addresses
        async with TakingTurns([first]).lease(beat=beat) as lease:
            self.lent.append(lease.address)
            yield lease


def of_another_token(security: Security) -> Security:
    return dataclasses.replace(security, token="another")


def that_revokes(security: Security) -> Security:
    """All callers of a member, whose certificates are still of the authority."""
    tls = security.current_tls
    assert tls is not None

    class Revoked(frozenset[int]):
        def __contains__(self, _: object) -> bool:
            return True

    return dataclasses.replace(security, tls=dataclasses.replace(tls, revoked=Revoked()))


@pytest.mark.parametrize("refusing", [of_another_token, that_revokes])
@pytest.mark.parametrize("role", ["decode", "prefill"])
@pytest.mark.parametrize("others", [0, 1])
async def test_a_node_that_does_not_admit_its_caller_is_passed_over(
    checkpoint: Checkpoint,
    role: str,
    refusing: Callable[[Security], Security],
    others: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bug: its client was told that the token is wrong, which was none of the client's."""
    monkeypatch.setattr("decode_node.node.RetryPolicy", lambda: RETRY)
    members = {member: Security(token="nodes", tls=new_tls(member, AUTHORITY)) for member in Member}
    path = str(checkpoint.path)
    async with AsyncExitStack() as stack:

        async def prefill(security: Security) -> str:
            return (await stack.enter_async_context(prefill_node(path, security))).address

        async def decode(security: Security, addresses: list[str]) -> DecodeNode:
            return await stack.enter_async_context(decode_node(path, addresses, security, max_local_prefill_tokens=0))

        good, bad = members[Member.PREFILL], refusing(members[Member.PREFILL])
        kinds = [bad, *[good] * others] if role == "prefill" else [good]
        prefills = [await prefill(security) for security in kinds]
        good, bad = members[Member.DECODE], refusing(members[Member.DECODE])
        kinds = [bad, *[good] * others] if role == "decode" else [good]
        nodes = [await decode(security, prefills) for security in kinds]
        pool = IdlestFirst([node.address for node in nodes])
        running = await stack.enter_async_context(
            killable_gateway(checkpoint.config, pool, num_decode_nodes=len(nodes), security=members[Member.GATEWAY])
        )
        end = await last(running.address)
        if others:
            assert isinstance(end, Finished)
            assert pool.lent == [node.address for node in nodes]
        else:
            assert type(end) is (PeerUnavailable if role == "decode" else PrefillUnavailable)
            assert "does not admit this process of the cluster" in str(end)
        if role == "decode":
            count = running.metrics.get_sample_value
            assert count("colm_requests_resubmitted_total", {"reason": "peer_refused"}) == (1 if others else 3)


async def last(address: str) -> Event | ColmError:
    async with AsyncClient(address) as client:
        try:
            return [event async for event in client.generate(**OPTIONS)][-1]
        except ColmError as err:
            return err
