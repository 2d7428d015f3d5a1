"""Certificates are renewed in time, and those that run use the new ones from the next connection on."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.lifecycle import _secrets
from cluster.options import load_config
from cluster.security.certificates import keep_looking_after, look_after, members_validity, renew
from cluster.security.secret_files import SecretFiles, write_machine_secrets, write_secrets
from cluster.state import ClusterState
from colm.errors import ConfigError
from colm.wire.authority import CERTIFICATE_DAYS, Authority
from colm.wire.channels import Channels
from colm.wire.endpoint import open_channel
from colm.wire.members import Member
from colm.wire.tls_files import CA_FILE, TlsFiles, certificate_path
from colm.wire.v1 import generation_service_pb2 as pb
from colm.wire.v1.generation_service_pb2_grpc import GenerationServiceStub
from tests.doors import ask_status, refusal, serving
from tests.gates import LIMIT_S
from tests.secret_folder import secret_files

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


@pytest.fixture
def secrets(tmp_path: Path) -> SecretFiles:
    return secret_files(tmp_path)


def files(secrets: SecretFiles, *members: Member) -> list[bytes]:
    return [certificate_path(Path(secrets.folder), member).read_bytes() for member in members or Member]


def rotate(secrets: SecretFiles) -> None:
    folder = Path(secrets.folder)
    assert len(renew(folder, folder, NOW, only_due=False)) == len(Member)


async def test_calls_go_on_while_both_sides_take_up_a_new_authority(secrets: SecretFiles, tmp_path: Path) -> None:
    """The whole folder is replaced, so nobody who kept the old certificates can still connect."""
    folder = Path(secrets.folder)
    server, caller = secrets.of_nodes(Member.DECODE), secrets.of_nodes(Member.GATEWAY)
    before = caller.current()
    channels = Channels(caller)
    more = asyncio.Event()

    async def requests() -> AsyncIterator[pb.GenerateRequest]:
        yield pb.GenerateRequest()
        await more.wait()
        yield pb.GenerateRequest()

    async with serving(server) as address, channels.use(address) as channel:
        call = GenerationServiceStub(channel).Generate(requests(), metadata=caller.metadata(), timeout=LIMIT_S)
        assert await call.read() is not grpc.aio.EOF
        write_secrets(tmp_path / "new")
        for name in (CA_FILE, "gateway.pem", "decode.pem"):
            (tmp_path / "new" / name).replace(folder / name)
        async with channels.use(address) as another:
            assert another is not channel
            assert await ask_status(another, caller) == 1
        error = await refusal(ask_status, address, before)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        more.set()
        assert await call.read() is not grpc.aio.EOF, "the old call goes on over its own connection"
        assert await call.read() is grpc.aio.EOF
    await channels.close()


async def test_a_channel_is_kept_while_certificates_stay(secrets: SecretFiles) -> None:
    channels = Channels(secrets.of_nodes(Member.GATEWAY))
    async with serving(secrets.of_nodes(Member.DECODE)) as address:
        async with channels.use(address) as first:
            pass
        async with channels.use(address) as second:
            assert second is first
        rotate(secrets)
        async with channels.use(address) as third:
            assert third is not first
    await channels.close()


def test_files_that_cannot_be_used_leave_what_was_read(secrets: SecretFiles, caplog: pytest.LogCaptureFixture) -> None:
    security = secrets.of_nodes(Member.DECODE)
    before = security.current_tls
    path = certificate_path(Path(secrets.folder), Member.DECODE)
    kept = path.read_bytes()
    for damaged in (b"", kept[:200], Authority.new(NOW).issue(Member.DECODE, NOW - 100 * DAY).pem):
        path.write_bytes(damaged)
        assert security.current_tls is before
    path.unlink()
    assert security.current_tls is before
    assert [record.getMessage().partition(" ")[0] for record in caplog.records] == ["tls.unusable"] * 4
    path.write_bytes(kept)
    path.chmod(0o600)
    assert security.current_tls == before


def test_a_pair_of_two_files_may_change_one_after_the_other(tmp_path: Path) -> None:
    authority = Authority.new(NOW)
    certificate, key = tmp_path / "fullchain.pem", tmp_path / "privkey.pem"

    def write(path: Path, content: bytes) -> None:
        path.with_suffix(".new").write_bytes(content)
        path.with_suffix(".new").chmod(0o600)
        path.with_suffix(".new").replace(path)

    old, new = (authority.issue(Member.PUBLIC, NOW) for _ in range(2))
    write(certificate, old.chain_pem)
    write(key, old.key_pem)
    source = TlsFiles(certificate=certificate, key=key, ca=None)
    write(key, new.key_pem)
    assert source.current().key_pem == old.key_pem, "a key without its certificate is not taken up"
    write(certificate, new.chain_pem)
    assert (source.current().key_pem, source.current().cert_pem) == (new.key_pem, new.chain_pem)


def test_certificates_are_renewed_when_two_thirds_of_their_life_are_over(secrets: SecretFiles) -> None:
    before = files(secrets)
    assert look_after(secrets, NOW + DAY * (CERTIFICATE_DAYS * 2 // 3 - 2)) == []
    assert files(secrets) == before
    later = NOW + DAY * (CERTIFICATE_DAYS * 2 // 3 + 1)
    assert look_after(secrets, later) == []
    assert not set(files(secrets)) & set(before)
    ends = [validity.end for validity in members_validity(Path(secrets.folder))]
    assert [(end - later).days for end in ends] == [CERTIFICATE_DAYS - 1] * len(Member)
    folder = Path(secrets.folder)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_a_cluster_stays_up_through_a_year_of_renewals_and_says_when_its_authority_ends(secrets: SecretFiles) -> None:
    said = []
    for day in range(0, 390, 3):
        said = look_after(secrets, NOW + DAY * day)
        assert bool(said) == (day > 397 - 21)
        assert all(validity.end > NOW + DAY * day for validity in members_validity(Path(secrets.folder)))
    assert len(said) == 1
    assert "ca.pem expires on" in said[0]
    assert "`colm certificates rotate --authority` makes another" in said[0]


def test_where_the_key_of_the_authority_is_not_the_operator_is_told(secrets: SecretFiles) -> None:
    folder = Path(secrets.folder)
    (folder / "ca_key.pem").unlink()
    before = files(secrets)
    said = look_after(secrets, NOW + DAY * (CERTIFICATE_DAYS - 10))
    assert files(secrets) == before
    assert sorted(line.partition(" ")[0] for line in said) == sorted(str(certificate_path(folder, m)) for m in Member)
    with pytest.raises(ConfigError, match=r"cannot read .*ca_key\.pem"):
        renew(folder, folder, NOW, only_due=False)


async def test_a_running_cluster_looks_after_its_certificates_by_itself(secrets: SecretFiles) -> None:
    before = files(secrets)
    task = asyncio.create_task(keep_looking_after(secrets, lambda: NOW + DAY * (CERTIFICATE_DAYS - 10)))
    async with asyncio.timeout(LIMIT_S):
        while set(files(secrets)) & set(before):
            await asyncio.sleep(0.01)
    task.cancel()


def test_up_renews_what_has_expired_while_the_cluster_was_down_or_says_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    write_secrets(folder, now=NOW - 100 * DAY)
    config = load_config(None, {"ray.address": "auto", "security.folder": folder})
    (folder / "ca_key.pem").rename(tmp_path / "elsewhere")
    said: list[str] = []
    secrets = _secrets(config, tmp_path, said.append, is_new=True)
    assert len(said) == len(Member)
    assert "`colm certificates rotate --from DIR`" in said[0]
    with pytest.raises(ConfigError, match="expired"):
        secrets.of_clients()
    (tmp_path / "elsewhere").rename(folder / "ca_key.pem")
    said.clear()
    assert _secrets(config, tmp_path, said.append, is_new=True).of_clients().tls
    assert said == []


async def test_another_machine_has_keys_of_its_own_for_what_it_runs(secrets: SecretFiles, tmp_path: Path) -> None:
    first, other = Path(secrets.folder), tmp_path / "other"
    write_machine_secrets(other, first, {Member.PREFILL})
    assert sorted(path.name for path in other.iterdir()) == ["ca.pem", "node_token", "prefill.pem"]
    assert {path.stat().st_mode & 0o777 for path in other.iterdir()} == {0o600}
    assert (other / "prefill.pem").read_bytes() != (first / "prefill.pem").read_bytes()
    elsewhere = SecretFiles(folder=str(other), has_tls=True, has_client_token=True)
    caller = secrets.of_nodes(Member.DECODE)
    async with serving(elsewhere.of_nodes(Member.PREFILL)) as address, open_channel(address, caller) as channel:
        assert await ask_status(channel, caller) == 1
    write_machine_secrets(tmp_path / "head", first, {Member.GATEWAY})
    head = {path.name for path in (tmp_path / "head").iterdir()}
    assert head == {"ca.pem", "client_token", "node_token", "gateway.pem", "public.pem"}


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_commands_make_show_and_rotate(tmp_path: Path) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    run("secrets", str(first))
    run("secrets", str(other), "--from", str(first), "--role", "decode")
    shown = json.loads(run("certificates", "show", "--secrets", str(first), "--json"))["certificates"]
    assert [row["name"] for row in shown] == ["authority", *(member.value for member in Member)]
    assert not any(row["is_due"] for row in shown)
    before = (other / "decode.pem").read_bytes()
    words = ("certificates", "rotate", "--secrets", str(other), "--from", str(first), "--json")
    assert [row["name"] for row in json.loads(run(*words))["renewed"]] == ["decode"]
    assert (other / "decode.pem").read_bytes() != before
    assert "decode.pem" in run("certificates", "show", "--secrets", str(other))


@pytest.mark.usefixtures("secrets")
def test_an_own_certificate_is_shown_beside_the_clusters(tmp_path: Path) -> None:
    (tmp_path / "own.pem").write_bytes(Authority.new(NOW).issue(Member.PUBLIC, NOW).chain_pem)
    ClusterState(
        gateway_address="a:1",
        ray_address="",
        ray_pid=None,
        client_token=None,
        ca_file="",
        own_certificate=str(tmp_path / "own.pem"),
    ).write(tmp_path)
    shown = json.loads(run("certificates", "show", "--state-dir", str(tmp_path), "--json"))["certificates"]
    assert [row["name"] for row in shown] == ["authority", *(member.value for member in Member), "own"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("secrets", "D", "--from", "F", "--role", "cook"), "--role='cook' is not one of gateway, decode, prefill"),
        (("secrets", "D", "--role", "decode"), "--role needs --from"),
        (("secrets", "D", "--ca-key", "k"), "--ca-certificate and --ca-key need one another"),
        (("certificates", "rotate", "--secrets", "nowhere"), "nowhere is not there; run `colm up`"),
    ],
)
def test_commands_that_cannot_work_say_what_to_do(words: tuple[str, ...], why: str) -> None:
    assert why in str(CliRunner().invoke(app, list(words)).exception)
