"""One authority of a cluster takes another's place while nodes and clients call, and a member is shut out."""

import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from typer.testing import CliRunner

import cluster.security.trust
from cluster.cli import app
from cluster.security.certificates import authorities_validity, look_after, members_validity, renew
from cluster.security.secret_files import SecretFiles, write_machine_secrets, write_secrets
from cluster.security.trust import OVERLAP_FILE, end_overlap, revoke, rotate_authority
from colm.errors import ConfigError
from colm.wire.certificates import read_certificates
from colm.wire.channels import Channels
from colm.wire.endpoint import open_channel
from colm.wire.members import Member
from colm.wire.outcome import Outcome
from colm.wire.security import Security, Tls
from colm.wire.tls_files import CA_FILE, REVOKED_FILE, certificate_path
from colm.wire.v1.decode_service_pb2_grpc import DecodeServiceStub
from tests.doors import ask_status, refusal, serving
from tests.gates import LIMIT_S
from tests.nodes import decode_node, decode_requests, prefill_node
from tests.tiny import tiny_checkpoint

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
OVERLAP = 30 * DAY
PAIRS = [(Member.GATEWAY, Member.DECODE), (Member.DECODE, Member.PREFILL)]


def machine(folder: Path) -> SecretFiles:
    return SecretFiles(folder=str(folder), has_tls=True, has_client_token=True)


@pytest.fixture
def first(tmp_path: Path) -> Path:
    write_secrets(tmp_path / "first", now=NOW - 50 * DAY)
    return tmp_path / "first"


@pytest.fixture
def other(first: Path, tmp_path: Path) -> Path:
    """Another machine's folder, of before the rotation."""
    write_machine_secrets(tmp_path / "other", first, set(Member), NOW - 50 * DAY)
    return tmp_path / "other"


async def connects(caller: Path, server: Path) -> bool:
    """Whether the members of two folders reach one another; all or none."""
    outcomes = set[bool]()
    for calls, is_called in PAIRS:
        security = machine(caller).of_nodes(calls)
        async with serving(machine(server).of_nodes(is_called)) as address, open_channel(address, security) as channel:
            try:
                outcomes.add(await ask_status(channel, security) == 1)
            except grpc.aio.AioRpcError:
                outcomes.add(False)
    (outcome,) = outcomes
    return outcome


async def is_trusted(ca_pem: bytes, folder: Path) -> bool:
    """Whether a client with a copy of `ca.pem` reaches a gateway by gRPC; a strict verifier must agree."""
    async with serving(machine(folder).of_clients()) as address:
        client = Security(token=machine(folder).of_clients().token, tls=Tls(ca_pem=ca_pem))
        async with open_channel(address, client) as channel:
            try:
                by_grpc = await ask_status(channel, client) == 1
            except grpc.aio.AioRpcError:
                by_grpc = False
    public = read_certificates(certificate_path(folder, Member.PUBLIC))
    policy = PolicyBuilder().store(Store(x509.load_pem_x509_certificates(ca_pem)))
    try:
        by_rules = bool(policy.build_server_verifier(x509.DNSName("localhost")).verify(public[0], [*public[1:]]))
    except VerificationError:
        by_rules = False
    assert by_grpc == by_rules
    return by_grpc


async def test_a_machine_that_has_not_heard_of_the_rotation_is_trusted_and_trusts(first: Path, other: Path) -> None:
    copied = (first / CA_FILE).read_bytes()
    until = rotate_authority(first, OVERLAP, NOW)
    assert until is not None
    assert abs(until - NOW - OVERLAP) < timedelta(seconds=1)
    assert await connects(first, other)
    assert await connects(other, first)
    assert await connects(first, first)
    assert await is_trusted(copied, first)
    assert await is_trusted((first / CA_FILE).read_bytes(), first)
    renew(other, first, NOW, only_due=False)
    assert (other / CA_FILE).read_bytes() == (first / CA_FILE).read_bytes()
    assert await connects(first, other)
    assert await connects(other, first)


async def test_after_the_overlap_only_what_the_new_one_signed_is_trusted(
    first: Path, other: Path, tmp_path: Path
) -> None:
    copied = (first / CA_FILE).read_bytes()
    rotate_authority(first, OVERLAP, NOW - 40 * DAY)
    write_machine_secrets(tmp_path / "new", first, set(Member), NOW - 40 * DAY)
    assert len(authorities_validity(first)) == 2
    assert await connects(tmp_path / "new", first), "nobody has looked after the folders since the end"
    for folder in (first, tmp_path / "new"):
        (folder / "ca_key.pem").unlink(missing_ok=True)
        look_after(machine(folder), NOW)
        assert len(authorities_validity(folder)) == 1
        assert not (folder / OVERLAP_FILE).exists()
    assert await connects(first, tmp_path / "new")
    assert await connects(tmp_path / "new", first)
    assert not await connects(other, first)
    assert not await connects(first, other)
    assert not await is_trusted(copied, first)
    assert await is_trusted((first / CA_FILE).read_bytes(), first)


async def test_an_overlap_of_nothing_shuts_out_whoever_has_no_new_folder(first: Path, other: Path) -> None:
    rotate_authority(first, OVERLAP, NOW)
    assert rotate_authority(first, timedelta(0), NOW) is None
    assert not await connects(other, first)
    assert not await connects(first, other)
    assert await connects(first, first)


def test_rotations_do_not_overlap_one_another(first: Path) -> None:
    rotate_authority(first, OVERLAP, NOW)
    with pytest.raises(ConfigError, match="--overlap-days 0, which ends both"):
        rotate_authority(first, OVERLAP, NOW + DAY)
    assert not end_overlap(first, NOW + DAY)
    look_after(machine(first), NOW + 31 * DAY)
    assert rotate_authority(first, OVERLAP, NOW + 31 * DAY)


def test_an_own_authority_is_not_rotated(first: Path, tmp_path: Path) -> None:
    write_secrets(tmp_path / "own", (first / CA_FILE, first / "ca_key.pem"))
    with pytest.raises(ConfigError, match="is your own"):
        rotate_authority(tmp_path / "own", OVERLAP, NOW)


def test_a_rotation_that_is_killed_anywhere_leaves_members_that_trust_each_other(
    first: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each of its writes; then the next look of the cluster puts right what is left to do."""

    def all_trust() -> bool:
        for mine, theirs in ((first, other), (other, first), (first, first)):
            policy = PolicyBuilder().store(Store(list(read_certificates(mine / CA_FILE))))
            for member in (Member.DECODE, Member.PREFILL):
                leaf, *above = read_certificates(certificate_path(theirs, member))
                policy.build_server_verifier(x509.DNSName(member.certificate_name)).verify(leaf, above)
        return True

    write = cluster.security.trust.write_private
    num_writes = 0
    while True:
        left = num_writes

        def write_until(path: Path, text: str) -> None:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            write(path, text)

        monkeypatch.setattr(cluster.security.trust, "write_private", write_until)
        try:
            rotate_authority(first, OVERLAP, NOW)
            break
        except KeyboardInterrupt:
            monkeypatch.undo()
        assert all_trust()
        look_after(machine(first), NOW)
        assert all_trust()
        (signer,) = {each.signed_by for each in members_validity(first)}
        assert signer == authorities_validity(first)[0].signed_by
        look_after(machine(first), NOW + 31 * DAY)
        assert [each.signed_by for each in authorities_validity(first)] == [signer]
        rotate_authority(first, timedelta(0), NOW)
        renew(other, first, NOW, only_due=False)
        num_writes += 1
    assert num_writes == 7


@asynccontextmanager
async def nodes(folder: Path, model: str) -> AsyncIterator[str]:
    async with AsyncExitStack() as stack:
        secrets = machine(folder)
        prefill = await stack.enter_async_context(prefill_node(model, secrets.of_nodes(Member.PREFILL)))
        node = await stack.enter_async_context(
            decode_node(model, [prefill.address], secrets.of_nodes(Member.DECODE), max_local_prefill_tokens=0)
        )
        yield node.address


def shown_at(address: str, ca: Path) -> bytes:
    """The certificate that a node shows to whoever trusts the authorities of now."""
    context = ssl.create_default_context(cafile=str(ca))
    context.check_hostname = False
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=LIMIT_S) as plain,
        context.wrap_socket(plain) as connection,
    ):
        return connection.getpeercert(binary_form=True) or b""


async def test_nodes_that_run_take_up_a_new_authority_and_no_request_notices(first: Path, tmp_path: Path) -> None:
    model = str(tiny_checkpoint(tmp_path / "model" / "tiny").path)
    caller = machine(first).of_nodes(Member.GATEWAY)
    channels = Channels(caller)

    async def answer(rotate: bool) -> list[int]:
        ids = []
        async with channels.use(address) as channel:
            call = DecodeServiceStub(channel).Decode(
                iter(decode_requests(range(3, 60), max_new_tokens=6)), metadata=caller.metadata(), timeout=LIMIT_S
            )
            with Outcome(call).statuses():
                async for message in call:
                    if message.WhichOneof("event") == "reserved" and rotate:
                        rotate_authority(first, OVERLAP, NOW)
                    if message.WhichOneof("event") == "token":
                        ids.append(message.token.token_id)
        return ids

    async with nodes(first, model) as address:
        expected = await answer(rotate=False)
        assert await answer(rotate=True) == expected
        assert await answer(rotate=False) == expected
        authority = authorities_validity(first)[0]
        shown = x509.load_der_x509_certificate(shown_at(address, first / CA_FILE))
        assert shown == read_certificates(certificate_path(first, Member.DECODE))[0]
        assert {each.signed_by for each in members_validity(first)} == {authority.signed_by}
    assert len(expected) == 6
    await channels.close()


async def test_a_revoked_member_is_refused_at_its_next_call_even_on_an_open_connection(
    first: Path, other: Path
) -> None:
    stolen, kept = (machine(folder).of_nodes(Member.GATEWAY) for folder in (other, first))
    async with serving(machine(first).of_nodes(Member.DECODE)) as address:
        async with open_channel(address, stolen) as channel:
            assert await ask_status(channel, stolen) == 1
            serial = read_certificates(certificate_path(other, Member.GATEWAY))[0].serial_number
            revoke(first, serial)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await ask_status(channel, stolen)
        assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert f"of serial {serial:x} is revoked" in str(raised.value.details())
        async with open_channel(address, kept) as channel:
            assert await ask_status(channel, kept) == 1
        (first / REVOKED_FILE).write_text("no number\n")
        assert (await refusal(ask_status, address, stolen)).code() == grpc.StatusCode.UNAUTHENTICATED
    (first / REVOKED_FILE).write_text(f"{serial:x}\n")
    renew(other, first, NOW, only_due=False)
    assert (other / REVOKED_FILE).read_text() == f"{serial:x}\n"


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_commands_say_who_signed_what_and_until_when(first: Path) -> None:
    words = ("certificates", "rotate", "--authority", "--overlap-days", "5", "--secrets", str(first), "--json")
    done = json.loads(run(*words))
    shown = json.loads(run("certificates", "show", "--secrets", str(first), "--json"))["certificates"]
    authority, old, *members = shown
    assert [row["name"] for row in shown] == ["authority", "old authority", *(member.value for member in Member)]
    assert old["end"] == done["old_authority_until"]
    assert {row["signed_by"] for row in members} == {authority["signed_by"]} != {old["signed_by"]}
    run("certificates", "revoke", members[1]["serial"], "--secrets", str(first))
    assert (first / REVOKED_FILE).read_text() == members[1]["serial"] + "\n"
    for word, why in ((("--authority", "--from", "x"), "leave --from out"),):
        result = CliRunner().invoke(app, ["certificates", "rotate", "--secrets", str(first), *word])
        assert why in str(result.exception)
    result = CliRunner().invoke(app, ["certificates", "revoke", "decode", "--secrets", str(first)])
    assert "'decode' is no serial number in hex" in str(result.exception)
