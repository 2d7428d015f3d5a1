"""Between nodes both sides show a certificate, and each call is made by the role that may make it."""

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from colm.checkpoint import Checkpoint
from colm.wire.authority import CERTIFICATE_DAYS, Authority
from colm.wire.endpoint import open_channel
from colm.wire.members import CLUSTER_NAME, Member
from colm.wire.outcome import Outcome
from colm.wire.security import Security, Tls, new_tls, new_token
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceStub
from tests.doors import ASKS, OpenDoor, ask_status, refusal, serving
from tests.nodes import decode_node, decode_requests, prefill_node
from tests.tiny import tiny_checkpoint

NOW = datetime.now(UTC)
AUTHORITY = Authority.new(NOW)
TOKEN = new_token()
MEMBERS = {member: Security(token=TOKEN, tls=new_tls(member, AUTHORITY)) for member in Member}
SERVERS = [Member.DECODE, Member.PREFILL]


def shown(issued_at: datetime, member: Member = Member.GATEWAY, authority: Authority = AUTHORITY) -> Tls:
    """What a caller of decode nodes shows, with a certificate made at some time."""
    pair = authority.issue(member, issued_at)
    return Tls(
        ca_pem=AUTHORITY.certificate_pem,
        cert_pem=pair.chain_pem,
        key_pem=pair.key_pem,
        server_name=Member.DECODE.certificate_name,
    )


STRANGERS = {
    "no certificate": Tls(ca_pem=AUTHORITY.certificate_pem, server_name=Member.DECODE.certificate_name),
    "an expired one": shown(NOW - timedelta(days=CERTIFICATE_DAYS, seconds=1)),
    "one that is not yet valid": shown(NOW + timedelta(days=3)),
    "another cluster's": shown(NOW, authority=Authority.new(NOW)),
    "the one for clients": shown(NOW, Member.PUBLIC),
    "a prefill node's, which calls nobody": shown(NOW, Member.PREFILL),
}


@ASKS
@pytest.mark.parametrize("server", SERVERS)
async def test_a_member_is_called_by_the_one_that_may(ask: Callable[..., object], server: Member) -> None:
    assert server.caller is not None
    caller = MEMBERS[server.caller]
    async with serving(MEMBERS[server]) as address, open_channel(address, caller) as channel:
        assert await ask(channel, caller) == 1


@pytest.mark.parametrize("tls", STRANGERS.values(), ids=STRANGERS.keys())
async def test_whoever_has_no_certificate_that_calls_is_refused_before_any_call(
    tls: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenDoor, "GetClusterStatus", lambda *_: pytest.fail("did some work"))
    async with serving(MEMBERS[Member.DECODE]) as address:
        error = await refusal(ask_status, address, Security(token=TOKEN, tls=tls))
    assert error.code() == grpc.StatusCode.UNAVAILABLE


@ASKS
@pytest.mark.parametrize(
    ("server", "caller"), [(Member.DECODE, Member.DECODE), (Member.PREFILL, Member.GATEWAY)], ids=str
)
async def test_a_member_that_may_call_others_only_is_refused_before_any_work(
    ask: Callable[..., object], server: Member, caller: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in ("GetClusterStatus", "Generate"):
        monkeypatch.setattr(OpenDoor, method, lambda *_: pytest.fail("did some work"))
    tls = dataclasses.replace(MEMBERS[caller].current_tls, server_name=server.certificate_name)  # type: ignore[type-var]
    async with serving(MEMBERS[server]) as address:
        error = await refusal(ask, address, Security(token=TOKEN, tls=tls))
    assert error.code() == grpc.StatusCode.UNAUTHENTICATED
    assert server.caller is not None
    expected = f"a certificate of {server.caller.certificate_name} is needed; this one is of {caller.certificate_name}"
    assert error.details() == expected


async def test_a_certificate_does_not_replace_the_token() -> None:
    async with serving(MEMBERS[Member.DECODE]) as address:
        error = await refusal(ask_status, address, Security(tls=MEMBERS[Member.GATEWAY].tls))
    assert error.code() == grpc.StatusCode.UNAUTHENTICATED
    assert "token" in str(error.details())


@pytest.mark.parametrize("member", [Member.PUBLIC, Member.PREFILL], ids=str)
async def test_a_caller_refuses_a_server_of_another_role(member: Member) -> None:
    """A gateway that is sent to a prefill node, or to another gateway, says nothing to it."""
    tls = dataclasses.replace(new_tls(member, AUTHORITY), caller_name=None)
    async with serving(Security(token=TOKEN, tls=tls)) as address:
        error = await refusal(ask_status, address, MEMBERS[Member.GATEWAY])
    assert error.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_connection_may_outlive_its_certificate_and_its_calls_may_not() -> None:
    now = NOW
    caller = MEMBERS[Member.GATEWAY]
    async with serving(MEMBERS[Member.DECODE], lambda: now) as address, open_channel(address, caller) as channel:
        assert await ask_status(channel, caller) == 1
        now += timedelta(days=CERTIFICATE_DAYS)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await ask_status(channel, caller)
    assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert f"the certificate of gateway.{CLUSTER_NAME} expired on" in str(raised.value.details())


async def test_the_gateway_demands_no_certificate_of_clients() -> None:
    client = Security(token=TOKEN, tls=new_tls(Member.PUBLIC, AUTHORITY).for_clients())
    async with serving(MEMBERS[Member.PUBLIC]) as address, open_channel(address, client) as channel:
        assert await ask_status(channel, client) == 1


@pytest.mark.parametrize("member", Member, ids=str)
def test_certificates_pass_strict_checks_for_what_they_are_for_and_for_nothing_else(member: Member) -> None:
    leaf = AUTHORITY.issue(member, NOW).leaf
    policy = PolicyBuilder().store(Store([AUTHORITY.certificate]))

    def serves() -> bool:
        try:
            return bool(policy.build_server_verifier(x509.DNSName(member.certificate_name)).verify(leaf, []))
        except VerificationError:
            return False

    def calls() -> bool:
        try:
            return bool(policy.build_client_verifier().verify(leaf, []))
        except VerificationError:
            return False

    assert (serves(), calls()) == (member is not Member.GATEWAY, member in (Member.GATEWAY, Member.DECODE))
    assert leaf.not_valid_after_utc - NOW == timedelta(days=CERTIFICATE_DAYS) - timedelta(microseconds=NOW.microsecond)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


async def test_a_request_goes_from_node_to_node_with_certificates_all_the_way(checkpoint: Checkpoint) -> None:
    path, caller = str(checkpoint.path), MEMBERS[Member.GATEWAY]
    async with (
        prefill_node(path, MEMBERS[Member.PREFILL]) as prefill,
        decode_node(path, [prefill.address], MEMBERS[Member.DECODE], max_local_prefill_tokens=0) as node,
        open_channel(node.address, caller) as channel,
    ):
        requests = iter(decode_requests(range(3, 60), max_new_tokens=2))
        call = DecodeServiceStub(channel).Decode(requests, metadata=caller.metadata(), timeout=60.0)
        with Outcome(call).statuses():
            kinds = [response.WhichOneof("event") async for response in call]
    assert kinds.count("token") == 2
    assert "prefill_progress" in kinds, "the prompt came from the prefill node"
