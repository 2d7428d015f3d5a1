"""The secrets of a cluster's gateway and nodes: files on every machine, which the Serve application only names."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from cluster.client_tokens import TOKENS_FILE, Clients
from cluster.options import SecuritySection
from cluster.security.trust import CA_KEY_FILE, copy_trust, issue, read_authority
from cluster.state import write_private
from colm.clock import utc_now
from colm.errors import ClusterError
from colm.wire.authority import Authority
from colm.wire.certificates import pem_of, read_certificates
from colm.wire.members import Member
from colm.wire.security import Security, new_token
from colm.wire.tls_files import CA_FILE, TlsFiles, of_member

_CLIENT_TOKEN, _NODE_TOKEN = "client_token", "node_token"


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnCertificate:
    """Files of a certificate for the gateway's clients that its operator has from elsewhere."""

    certificate: str
    key: str

    def open(self) -> TlsFiles:
        """The certificate, which is read again when its files change.

        Raises:
            ConfigError: a file cannot be used.
        """
        return TlsFiles(certificate=Path(self.certificate), key=Path(self.key), ca=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class SecretFiles:
    """Where a replica finds its secrets on its own machine. Clients' and nodes' tokens differ."""

    folder: str
    has_tls: bool
    has_client_token: bool
    """False admits every client."""
    clients_file: str | None = None
    """Tokens of further clients, which `colm token` writes; the gateway alone reads it."""
    own_certificate: OwnCertificate | None = None
    """What the gateway shows to clients in place of a certificate of the cluster's authority."""

    @classmethod
    def of(
        cls, section: SecuritySection, folder: Path, *, clients_folder: Path, own_certificate: OwnCertificate | None
    ) -> Self:
        """What the options say, of secrets in `folder` and of clients' tokens in `clients_folder`."""
        return cls(
            folder=str(folder.absolute()),
            has_tls=section.tls == "auto",
            has_client_token=section.token == "auto",
            clients_file=str((clients_folder / TOKENS_FILE).absolute()),
            own_certificate=own_certificate,
        )

    def of_clients(self) -> Security:
        """What the gateway demands of clients.

        Raises:
            ClusterError, ConfigError: a file is missing or empty, or others can read it; named with the way out.
        """
        token = self._client_token()
        if not self.has_tls:
            return Security(token=token)
        if self.own_certificate is not None:
            return Security(token=token, tls=self.own_certificate.open())
        return Security(token=token, tls=of_member(Path(self.folder), Member.PUBLIC))

    def clients(self) -> Clients:
        """Whom the gateway admits.

        Raises:
            ClusterError: see `of_clients`.
        """
        return Clients(self._client_token(), Path(self.clients_file) if self.clients_file else None)

    def of_nodes(self, member: Member) -> Security:
        """What a member of the cluster shows to those that it calls, and demands of those that call it.

        Raises:
            ClusterError, ConfigError: see `of_clients`.
        """
        tls = of_member(Path(self.folder), member) if self.has_tls else None
        return Security(token=_read(Path(self.folder) / _NODE_TOKEN), tls=tls)

    def _client_token(self) -> str | None:
        return _read(Path(self.folder) / _CLIENT_TOKEN) if self.has_client_token else None


def write_secrets(folder: Path, authority: tuple[Path, Path] | None = None, now: datetime | None = None) -> None:
    """Make fresh tokens, and a key and a certificate for each member, in files that only this user can read.

    Args:
        folder: to make.
        authority: files of a certificate and its key that sign the members' certificates; the key stays where it is.
            None makes an authority.
        now: the time.

    Raises:
        ClusterError: the folder is there already, or cannot be made.
        ConfigError: the authority cannot be used.
    """
    now = now or utc_now()
    signs = Authority.new(now) if authority is None else Authority.read(*authority, now)
    with _made(folder):
        write_private(folder / _CLIENT_TOKEN, new_token())
        write_private(folder / _NODE_TOKEN, new_token())
        if authority is None:
            write_private(folder / CA_FILE, signs.certificate_pem.decode())
            write_private(folder / CA_KEY_FILE, signs.key_pem.decode())
        else:
            write_private(folder / CA_FILE, pem_of(read_certificates(authority[0])).decode())
            (folder / CA_KEY_FILE).symlink_to(authority[1].absolute())
        issue(folder, signs, list(Member), now)


def write_machine_secrets(folder: Path, first: Path, members: Collection[Member], now: datetime | None = None) -> None:
    """Make the secrets of one more machine: keys and certificates of its own, for the members that it will run.

    Args:
        folder: to make.
        first: the folder that `write_secrets` made, with the authority's key.
        members: that run on the machine; a gateway brings the client token and the certificate for clients.
        now: the time.

    Raises:
        ClusterError: the folder is there already, or cannot be made, or the first one lacks a file.
        ConfigError: the authority cannot be used.
    """
    now = now or utc_now()
    signs = read_authority(first, now)
    with _made(folder):
        write_private(folder / _NODE_TOKEN, _read(first / _NODE_TOKEN))
        if Member.GATEWAY in members:
            write_private(folder / _CLIENT_TOKEN, _read(first / _CLIENT_TOKEN))
            members = {*members, Member.PUBLIC}
        copy_trust(folder, first)
        issue(folder, signs, members, now)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(mode=0o700)
    except OSError as err:
        raise ClusterError(f"cannot make {folder}: {err.strerror}; name a folder that is not there yet") from err
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _read(path: Path) -> str:
    try:
        if (mode := path.stat().st_mode) & 0o007:
            raise ClusterError(f"others may read {path} (mode {mode & 0o777:o}); chmod it to 600")
        text = path.read_text().strip()
    except OSError as err:
        raise ClusterError(
            f"cannot read {path}: {err.strerror}; the folder of `colm secrets` must be on every machine"
        ) from err
    if not text:
        raise ClusterError(f"{path} is empty; copy the folder of `colm secrets` once more")
    return text
