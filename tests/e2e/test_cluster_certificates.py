"""A running cluster's certificates: demanded of whoever calls a node, and replaced while it answers."""

import socket
import ssl
from dataclasses import replace

import pytest

from cluster.security.secret_files import SecretFiles
from colm.client import Client, collect
from colm.errors import PeerUnavailable
from colm.events import Token
from colm.nodes import Role
from colm.sampling import SamplingParams
from colm.wire.endpoint import open_blocking_channel
from colm.wire.members import Member
from colm.wire.security import Security
from colm.wire.status import rpc_errors
from colm.wire.v1 import decode_service_pb2 as pb
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceStub
from tests.e2e.conftest import RunningCluster

PROMPT = list(range(300, 500))
GREEDY = SamplingParams(ignore_eos=True)


def shown_at(address: str) -> bytes:
    """The certificate that a server shows now."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((host, int(port)), timeout=60) as plain, context.wrap_socket(plain) as connection:
        return connection.getpeercert(binary_form=True) or b""


def servers(cluster: RunningCluster) -> list[str]:
    nodes = [node.address for role in Role for node in cluster.nodes(role)]
    return [cluster.state.gateway_address, *nodes]


def test_certificates_and_then_their_authority_are_replaced_while_the_cluster_answers(cluster: RunningCluster) -> None:
    before = {shown_at(address) for address in servers(cluster)}
    authority = cluster.state.security.current_tls
    with cluster.client() as client:
        for words in ((), ("--authority",)):
            events = client.generate(token_ids=PROMPT, max_new_tokens=48, sampling=GREEDY)
            first = next(event for event in events if isinstance(event, Token))
            cluster.colm("certificates", "rotate", *words)
            through = [first, *collect(events).tokens]
            after = collect(client.generate(token_ids=PROMPT, max_new_tokens=48, sampling=GREEDY)).tokens
            assert [token.token_id for token in through] == [token.token_id for token in after]
            now = {shown_at(address) for address in servers(cluster)}
            assert not before & now
            before |= now
    assert cluster.state.security.current_tls != authority
    for security in (cluster.state.security, Security(token=cluster.state.client_token, tls=authority)):
        with Client(cluster.state.gateway_address, security) as fresh:
            assert fresh.cluster_status().nodes
    cluster.assert_idle()


def test_a_client_that_reaches_a_node_is_not_let_in(cluster: RunningCluster) -> None:
    """Even with the nodes' token, and with the certificate that the gateway shows to clients."""
    secrets = SecretFiles(folder=str(cluster.state_dir / "secrets"), has_tls=True, has_client_token=True)
    (node,) = cluster.nodes(Role.DECODE)
    gateway, public = secrets.of_nodes(Member.GATEWAY).current_tls, secrets.of_clients().current_tls
    assert gateway is not None
    assert public is not None
    for tls in (gateway.for_clients(), replace(public, server_name=gateway.server_name)):
        stranger = Security(token=secrets.of_nodes(Member.GATEWAY).token, tls=tls)
        with open_blocking_channel(node.address, stranger) as channel:
            requests = iter([pb.DecodeRequest()])
            call = DecodeServiceStub(channel).Decode(requests, metadata=stranger.metadata(), timeout=60)
            with pytest.raises(PeerUnavailable, match="is not reachable"), rpc_errors("node"):
                list(call)
