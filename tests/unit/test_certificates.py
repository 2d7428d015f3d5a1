"""Keys and certificates in files are checked before anything starts, and refused by file and reason."""

import asyncio
import ipaddress
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from cluster.cli import app
from cluster.options import load_config
from cluster.security.certificates import look_after
from cluster.security.exposure import advice_to_clients, own_certificate, require_encryption
from cluster.security.secret_files import OwnCertificate, SecretFiles, write_secrets
from cluster.state import ClusterState
from colm.errors import ConfigError
from colm.node_cli import read_security
from colm.wire.authority import CERTIFICATE_DAYS, Authority
from colm.wire.certificates import covers, pem_of, read_pair, system_authorities
from colm.wire.endpoint import open_channel
from colm.wire.members import Member
from colm.wire.security import Security, Tls, new_token
from decode_node.__main__ import main as decode_command
from tests.doors import ask_status, refusal, serving

NOW = datetime.now(UTC)
LIFE = timedelta(days=CERTIFICATE_DAYS)
AUTHORITY = Authority.new(NOW)
PAIR = AUTHORITY.issue(Member.PUBLIC, NOW)
OLD, NEW = (AUTHORITY.issue(Member.PUBLIC, at) for at in (NOW - LIFE, NOW + LIFE))


def written(folder: Path, *, certificate: bytes = PAIR.chain_pem, key: bytes = PAIR.key_pem) -> tuple[Path, Path]:
    """Files of a certificate and a key."""
    paths = folder / "fullchain.pem", folder / "privkey.pem"
    for path, content in zip(paths, (certificate, key), strict=True):
        path.write_bytes(content)
        path.chmod(0o600)
    return paths


def certificate_of(*names: x509.GeneralName) -> bytes:
    """A certificate of the pair's key for other names."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(AUTHORITY.certificate.subject)
        .public_key(PAIR.leaf.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + LIFE)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    return pem_of([builder.sign(AUTHORITY.key, hashes.SHA256())])


def encrypted_key() -> bytes:
    how = serialization.BestAvailableEncryption(b"secret")
    return PAIR.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


BAD_PAIRS = {
    "expired": (
        {"certificate": OLD.chain_pem, "key": OLD.key_pem},
        r"the certificate in .*fullchain\.pem expired on 20..-..-.. ..:.. UTC; renew it",
    ),
    "not yet valid": (
        {"certificate": NEW.chain_pem, "key": NEW.key_pem},
        r"the certificate in .*fullchain\.pem is valid only from",
    ),
    "another's key": (
        {"key": OLD.key_pem},
        r"the key in .*privkey\.pem is not that of the certificate in .*fullchain\.pem",
    ),
    "an encrypted key": ({"key": encrypted_key()}, r"the key in .*privkey\.pem is encrypted"),
    "no key": ({"key": PAIR.chain_pem}, r"privkey\.pem holds no private key in PEM form"),
    "no certificate": ({"certificate": b"rubbish"}, r"fullchain\.pem holds no certificate in PEM form"),
    "no name": ({"certificate": certificate_of()}, r"the certificate is for no name and no address"),
}


def own(config: dict[str, object], said: list[str]) -> OwnCertificate | None:
    return own_certificate(load_config(None, config).gateway, said.append)


@pytest.mark.parametrize(("content", "why"), BAD_PAIRS.values(), ids=BAD_PAIRS.keys())
def test_an_own_certificate_that_cannot_serve_is_refused_by_file_and_reason(
    tmp_path: Path, content: dict[str, bytes], why: str
) -> None:
    certificate, key = written(tmp_path, **content)
    with pytest.raises(ConfigError, match=why) as refused:
        own({"gateway.tls_certificate": certificate, "gateway.tls_key": key}, [])
    assert str(refused.value).startswith("gateway.tls_certificate and gateway.tls_key: ")


def test_a_key_that_others_may_read_and_a_file_that_is_not_there_are_refused(tmp_path: Path) -> None:
    certificate, key = written(tmp_path)
    key.chmod(0o604)
    with pytest.raises(ConfigError, match=rf"others may read the key in {key} \(mode 604\); chmod it to 600"):
        read_pair(certificate, key, NOW)
    with pytest.raises(ConfigError, match=f"cannot read {tmp_path / 'no'}: No such file"):
        read_pair(tmp_path / "no", key, NOW)


def test_a_key_that_its_group_may_read_is_called_insecure_and_serves(tmp_path: Path) -> None:
    certificate, key = written(tmp_path)
    key.chmod(0o640)
    said: list[str] = []
    found = own({"gateway.tls_certificate": certificate, "gateway.tls_key": key}, said)
    assert found == OwnCertificate(certificate=str(certificate), key=str(key))
    assert said == [f"insecure: the group of {key} may read it; chmod it to 600"]


def test_a_host_that_the_certificate_is_not_for_is_refused(tmp_path: Path) -> None:
    certificate, key = written(tmp_path, certificate=certificate_of(x509.DNSName("a.example.org")))
    config = {"gateway.tls_certificate": certificate, "gateway.tls_key": key}
    for host in ("a.example.org", "0.0.0.0", "127.0.0.1"):
        assert own(config | {"gateway.host": host}, []) is not None
    with pytest.raises(ConfigError, match=r"is for a\.example\.org and not for gateway\.host='b\.example\.org'"):
        own(config | {"gateway.host": "b.example.org"}, [])


@pytest.mark.parametrize(
    ("host", "is_covered"),
    [
        ("a.example.org", True),
        ("A.EXAMPLE.ORG", True),
        ("b.example.net", True),
        ("b.c.example.net", False),
        ("example.net", False),
        ("192.0.2.7", True),
        ("192.0.2.8", False),
    ],
)
def test_a_certificate_covers_its_names_and_addresses(host: str, is_covered: bool) -> None:
    names = x509.DNSName("a.example.org"), x509.DNSName("*.example.net")
    pem = certificate_of(*names, x509.IPAddress(ipaddress.ip_address("192.0.2.7")))
    assert covers(x509.load_pem_x509_certificate(pem), host) == is_covered


BAD_OPTIONS = {
    "half of a pair": ({"gateway.tls_certificate": "c"}, r"gateway\.tls_certificate='c' needs gateway\.tls_key"),
    "the other half": ({"security.ca_key": "k"}, r"security\.ca_key='k' needs security\.ca_certificate"),
    "of no use": (
        {"gateway.tls_certificate": "c", "gateway.tls_key": "k", "security.tls": "off"},
        r"gateway\.tls_certificate='c' with security\.tls='off' is not used",
    ),
    "two authorities": (
        {"security.ca_certificate": "c", "security.ca_key": "k", "security.folder": "f", "ray.address": "auto"},
        r"security\.ca_certificate='c' with security\.folder='f': that folder has its authority already",
    ),
}


@pytest.mark.parametrize(("options", "why"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_options_that_do_not_fit_together_are_refused(options: dict[str, str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load_config(None, options)


@pytest.mark.parametrize("beyond", [{"gateway.host": "0.0.0.0"}, {"ray.address": "auto", "security.folder": "f"}])
def test_plaintext_leaves_this_machine_only_where_that_is_called_insecure(beyond: dict[str, object]) -> None:
    off = {"security.tls": "off"}
    require_encryption(load_config(None, off))
    require_encryption(load_config(None, beyond))
    require_encryption(load_config(None, off | beyond | {"security.insecure": True}))
    with pytest.raises(ConfigError, match=r"in plaintext; leave tls on, or set security\.insecure = true"):
        require_encryption(load_config(None, off | beyond))


def test_a_node_by_hand_speaks_plaintext_on_the_loopback_or_where_that_is_called_insecure() -> None:
    """Bug: it listened in plaintext on any address, and said nothing."""
    for host, insecure in (("127.0.0.1", False), ("::1", False), ("0.0.0.0", True)):
        assert read_security(None, None, Member.PREFILL, [host], insecure=insecure) == Security()
    with pytest.raises(ConfigError, match=r"host '0\.0\.0\.0' without --tls-dir: .* or --insecure"):
        read_security(None, None, Member.PREFILL, ["0.0.0.0"], insecure=False)


def test_a_decode_node_by_hand_calls_no_other_machine_in_plaintext() -> None:
    command = typer.Typer()
    command.command()(decode_command)
    result = CliRunner().invoke(command, ["--model", "m", "--prefill", "[::1]:1", "--prefill", "192.0.2.1:1"])
    assert result.exit_code == 1
    assert "host '192.0.2.1' without --tls-dir" in result.output


async def test_clients_of_this_machine_trust_the_gateways_own_certificate_and_follow_its_renewal(
    tmp_path: Path,
) -> None:
    name = x509.DNSName("*.example.org")
    certificate, key = written(tmp_path, certificate=certificate_of(name))
    write_secrets(tmp_path / "secrets")
    secrets = SecretFiles(
        folder=str(tmp_path / "secrets"),
        has_tls=True,
        has_client_token=True,
        own_certificate=own({"gateway.tls_certificate": certificate, "gateway.tls_key": key}, []),
    )
    state = ClusterState(
        gateway_address="",
        ray_address="",
        ray_pid=None,
        client_token=secrets.of_clients().token,
        ca_file=str(tmp_path / "secrets" / "ca.pem"),
        own_certificate=str(certificate),
    )
    async with serving(secrets.of_clients()) as address:
        for _ in range(2):
            client = state.security
            async with open_channel(address, client) as channel:
                assert await ask_status(channel, client) == 1
            certificate.write_bytes(certificate_of(name))
        clusters_own = replace(state, own_certificate=None).security
        assert (await refusal(ask_status, address, clusters_own)).code() == grpc.StatusCode.UNAVAILABLE


def test_members_name_the_key_of_an_own_authority_as_that_one_does() -> None:
    """Bug: whoever compares the two found no issuer, where the authority's tool had not hashed its key with SHA-1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "own")])
    identifier = x509.SubjectKeyIdentifier(b"a name of its own")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    leaf = Authority(certificate, key).issue(Member.DECODE, NOW).leaf
    named = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert named.key_identifier == identifier.digest


async def test_an_own_authority_signs_for_the_members_and_its_key_stays_where_it_is(tmp_path: Path) -> None:
    ca, ca_key = written(tmp_path, certificate=AUTHORITY.certificate_pem, key=AUTHORITY.key_pem)
    write_secrets(tmp_path / "secrets", (ca, ca_key))
    assert (tmp_path / "secrets" / "ca_key.pem").readlink() == ca_key
    assert (tmp_path / "secrets" / "ca.pem").read_bytes() == AUTHORITY.certificate_pem
    secrets = SecretFiles(folder=str(tmp_path / "secrets"), has_tls=True, has_client_token=True)
    caller = secrets.of_nodes(Member.GATEWAY)
    async with serving(secrets.of_nodes(Member.DECODE)) as address, open_channel(address, caller) as channel:
        assert await ask_status(channel, caller) == 1


@pytest.mark.parametrize(("days", "is_told"), [(60, False), (80, True)])
def test_the_operator_is_told_in_time_that_his_own_certificate_ends(tmp_path: Path, days: int, is_told: bool) -> None:
    certificate, key = written(tmp_path)
    write_secrets(tmp_path / "secrets")
    secrets = SecretFiles(
        folder=str(tmp_path / "secrets"),
        has_tls=True,
        has_client_token=True,
        own_certificate=OwnCertificate(certificate=str(certificate), key=str(key)),
    )
    end = f"{PAIR.leaf.not_valid_after_utc:%Y-%m-%d}"
    told = [f"{certificate} expires on {end}; renew it: it is read again when it changes"]
    assert look_after(secrets, NOW + timedelta(days=days)) == (told if is_told else [])


def test_clients_of_other_machines_are_told_whom_to_trust(tmp_path: Path) -> None:
    write_secrets(tmp_path / "secrets")
    plain = SecretFiles(folder=str(tmp_path / "secrets"), has_tls=True, has_client_token=True)
    own = replace(plain, own_certificate=OwnCertificate(certificate="c", key="k"))
    here, beyond = load_config(None, {}), load_config(None, {"gateway.host": "0.0.0.0"})
    assert advice_to_clients(here, plain) is None
    assert f"a copy of {tmp_path / 'secrets' / 'ca.pem'}" in str(advice_to_clients(beyond, plain))
    assert "--system-ca" in str(advice_to_clients(beyond, own))


def test_a_certificate_that_may_not_sign_is_no_authority(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fullchain\.pem is not of an authority"):
        write_secrets(tmp_path / "secrets", written(tmp_path))
    assert not (tmp_path / "secrets").exists()


@pytest.fixture
def trusting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Has the system trust that authority alone."""

    def trust(authority: bytes) -> None:
        (tmp_path / "trusted.pem").write_bytes(authority)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "trusted.pem"))

    return trust


async def test_a_client_that_trusts_the_system_checks_authority_and_address(
    trusting: Callable[[bytes], None], tmp_path: Path
) -> None:
    tls = Tls(ca_pem=b"", cert_pem=PAIR.chain_pem, key_pem=PAIR.key_pem)
    token = new_token()
    (tmp_path / "token").write_text(token)
    (tmp_path / "document").write_text("a document")

    def submit(address: str) -> str:
        words = ("--address", address, "--token-file", str(tmp_path / "token"), "--system-ca", "--raw")
        result = CliRunner().invoke(app, ["submit", str(tmp_path / "document"), *words])
        return str(result.exception)

    async with serving(Security(token=token, tls=tls)) as address:
        trusting(AUTHORITY.certificate_pem)
        assert "unknown kind" in await asyncio.to_thread(submit, address), "the empty answer has come"
        client = Security(token=token, tls=Tls(ca_pem=system_authorities(), server_name=None))
        async with open_channel(address, client) as channel:
            assert await ask_status(channel, client) == 1
        trusting(Authority.new(NOW).certificate_pem)
        assert "is not reachable" in await asyncio.to_thread(submit, address)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--system-ca", "--plaintext"), "--plaintext and --system-ca exclude each other"),
        (("--system-ca", "--ca-file", "ca.pem"), "--ca-file and --system-ca exclude each other"),
        (("--server-name", "n"), "--server-name='n' needs --ca-file"),
    ],
)
def test_ways_of_trusting_a_gateway_exclude_each_other(words: tuple[str, ...], why: str) -> None:
    result = CliRunner().invoke(app, ["submit", "-", "--address", "127.0.0.1:1", *words])
    assert why in str(result.exception)
