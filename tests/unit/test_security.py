"""Only callers with the right token, over TLS with the cluster's own authority, are let in."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from grpc_health.v1 import health_pb2, health_pb2_grpc

from colm.wire.endpoint import bind, create_server, open_blocking_channel, open_channel
from colm.wire.members import CLUSTER_NAME, Member
from colm.wire.security import AUTHORIZATION, Security, Tls, new_tls, new_token
from colm.wire.v1 import generation_service_pb2 as pb
from colm.wire.v1.generation_service_pb2_grpc import (
    GenerationServiceStub,
)
from tests.doors import ASKS, ask_status, ask_tiles, refusal, serving
from tests.gates import LIMIT_S
from tests.secret_folder import secret_files

TLS = new_tls()
TOKEN = new_token()


@ASKS
@pytest.mark.parametrize("tls", [None, TLS], ids=["plaintext", "tls"])
async def test_the_right_token_is_let_in(ask: Callable[..., object], tls: Tls | None) -> None:
    client = Security(token=TOKEN, tls=tls and tls.for_clients())
    async with serving(Security(token=TOKEN, tls=tls)) as address, open_channel(address, client) as channel:
        assert await ask(channel, client) == 1


@ASKS
@pytest.mark.parametrize(
    ("token", "message"), [(None, "a token is needed"), (TOKEN + "x", "wrong"), (TOKEN[:-1], "wrong")]
)
async def test_any_other_token_is_unauthenticated(ask: Callable[..., object], token: str | None, message: str) -> None:
    async with serving(Security(token=TOKEN, tls=TLS)) as address:
        error = await refusal(ask, address, Security(token=token, tls=TLS.for_clients()))
    assert error.code() == grpc.StatusCode.UNAUTHENTICATED
    assert message in str(error.details())


async def test_the_bare_token_without_its_scheme_is_unauthenticated() -> None:
    async with serving(Security(token=TOKEN)) as address, open_channel(address, Security()) as channel:
        call = GenerationServiceStub(channel).GetClusterStatus(
            pb.GetClusterStatusRequest(), metadata=((AUTHORIZATION, TOKEN),), timeout=LIMIT_S
        )
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call
    assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_a_refusal_does_not_repeat_the_token() -> None:
    async with serving(Security(token=TOKEN)) as address:
        error = await refusal(ask_status, address, Security(token="guess"))
    assert TOKEN not in repr(error)
    assert "guess" not in str(error.details())


async def test_health_needs_no_token() -> None:
    client = Security(tls=TLS.for_clients())
    async with serving(Security(token=TOKEN, tls=TLS)) as address, open_channel(address, client) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=LIMIT_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_method_that_does_not_exist_is_unimplemented() -> None:
    async with serving(Security(token=TOKEN)) as address, open_channel(address, Security()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary("/colm.wire.v1.GenerationService/Nothing")(b"", timeout=LIMIT_S)
    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_without_a_token_the_server_is_open() -> None:
    async with serving(Security()) as address, open_channel(address, Security()) as channel:
        assert await ask_status(channel, Security()) == 1


@pytest.mark.parametrize(
    "tls", [None, new_tls().for_clients()], ids=["in plaintext", "with another cluster's authority"]
)
async def test_a_client_without_the_authority_cannot_connect(tls: Tls | None) -> None:
    async with serving(Security(token=TOKEN, tls=TLS)) as address:
        error = await refusal(ask_status, address, Security(token=TOKEN, tls=tls))
    assert error.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_client_that_checks_the_address_gets_in_on_this_machine() -> None:
    client = Security(token=TOKEN, tls=Tls(ca_pem=TLS.ca_pem, server_name=None))
    async with serving(Security(token=TOKEN, tls=TLS)) as address, open_channel(address, client) as channel:
        assert await ask_status(channel, client) == 1


async def test_a_certificate_for_another_name_is_refused() -> None:
    client = Security(token=TOKEN, tls=Tls(ca_pem=TLS.ca_pem, server_name="elsewhere.example"))
    async with serving(Security(token=TOKEN, tls=TLS)) as address:
        error = await refusal(ask_status, address, client)
    assert error.code() == grpc.StatusCode.UNAVAILABLE


def test_certificates_pass_strict_checks_for_what_they_are_made_for_and_not_for_ever() -> None:
    """Bug: they had no key identifiers and no key usage, and lived ten years."""
    assert TLS.cert_pem is not None
    authority, certificate = (x509.load_pem_x509_certificate(pem) for pem in (TLS.ca_pem, TLS.cert_pem))
    policy = PolicyBuilder().store(Store([authority]))
    assert policy.build_server_verifier(x509.DNSName(CLUSTER_NAME)).verify(certificate, [])
    with pytest.raises(VerificationError):
        policy.build_client_verifier().verify(certificate, [])
    for made in (authority, certificate):
        assert (made.not_valid_after_utc - made.not_valid_before_utc).days < 400


async def test_a_clients_token_does_not_open_a_node(tmp_path: Path) -> None:
    secrets = secret_files(tmp_path)
    nodes, caller = secrets.of_nodes(Member.PREFILL), secrets.of_nodes(Member.DECODE)
    async with serving(nodes) as node:
        error = await refusal(ask_tiles, node, replace(caller, token=secrets.of_clients().token))
    assert error.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_a_nodes_token_does_not_open_the_gateway(tmp_path: Path) -> None:
    secrets = secret_files(tmp_path)
    async with serving(secrets.of_clients()) as gateway:
        of_clients = secrets.of_clients().current_tls
        assert of_clients is not None
        to_gateway = Security(token=secrets.of_nodes(Member.GATEWAY).token, tls=of_clients.for_clients())
        error = await refusal(ask_status, gateway, to_gateway)
    assert error.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_a_blocking_channel_is_let_in_the_same_way() -> None:
    import asyncio

    client = Security(token=TOKEN, tls=TLS.for_clients())

    def ask(address: str) -> int:
        with open_blocking_channel(address, client) as channel:
            answer = GenerationServiceStub(channel).GetClusterStatus(
                pb.GetClusterStatusRequest(), metadata=client.metadata(), timeout=LIMIT_S
            )
        return int(answer.num_active_requests)

    async with serving(Security(token=TOKEN, tls=TLS)) as address:
        assert await asyncio.to_thread(ask, address) == 1


async def test_a_port_that_is_taken_is_named() -> None:
    async with serving(Security()) as address:
        host, port = address.split(":")
        with pytest.raises(OSError, match=f"cannot listen on {address}"):
            bind(create_server(Security()), host, int(port), Security())


def test_serving_without_a_key_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tls\.cert_pem and tls\.key_pem are needed"):
        Security(tls=TLS.for_clients()).server_credentials()


def test_clients_are_given_no_key() -> None:
    assert TLS.for_clients() == Tls(ca_pem=TLS.ca_pem, cert_pem=None, key_pem=None)


def test_security_shows_no_secret_when_printed() -> None:
    shown = repr(Security(token=TOKEN, tls=TLS))
    assert TOKEN not in shown
    assert "PRIVATE KEY" not in shown


def test_tls_shows_no_key_when_printed() -> None:
    """Bug: the dataclass's own repr put the private key into logs and traces."""
    assert "PRIVATE KEY" not in repr(TLS)


def test_tokens_and_authorities_are_never_the_same_twice() -> None:
    assert new_token() != new_token()
    assert new_tls().ca_pem != new_tls().ca_pem
