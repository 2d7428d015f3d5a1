"""The secrets of a cluster's gateway and nodes: files on every machine, which the Serve application only names."""

from dataclasses import dataclass
from pathlib import Path

from cluster.client_tokens import Clients
from cluster.state import write_private
from colm.errors import ClusterError
from colm.wire.security import Security, Tls, new_tls, new_token

_CLIENT_TOKEN, _NODE_TOKEN = "client_token", "node_token"
_CA, _CERT, _KEY = "ca.pem", "cert.pem", "key.pem"


@dataclass(frozen=True, kw_only=True, slots=True)
class SecretFiles:
    """Where a replica finds its secrets on its own machine. Clients' and nodes' tokens differ."""

    folder: str
    has_tls: bool
    has_client_token: bool
    """False admits every client."""
    clients_file: str | None = None
    """Tokens of further clients, which `colm token` writes; the gateway alone reads it."""

    def of_clients(self) -> Security:
        """What the gateway demands of clients.

        Raises:
            ClusterError: a file is missing or empty, or others can read it; named with the way out.
        """
        return Security(token=self._read(_CLIENT_TOKEN) if self.has_client_token else None, tls=self._tls())

    def clients(self) -> Clients:
        """Whom the gateway admits.

        Raises:
            ClusterError: see `of_clients`.
        """
        return Clients(self.of_clients().token, Path(self.clients_file) if self.clients_file else None)

    def of_nodes(self) -> Security:
        """What nodes demand of the gateway and of each other.

        Raises:
            ClusterError: see `of_clients`.
        """
        return Security(token=self._read(_NODE_TOKEN), tls=self._tls())

    def _tls(self) -> Tls | None:
        if not self.has_tls:
            return None
        ca, cert, key = (self._read(name).encode() for name in (_CA, _CERT, _KEY))
        return Tls(ca_pem=ca, cert_pem=cert, key_pem=key)

    def _read(self, name: str) -> str:
        path = Path(self.folder) / name
        try:
            if (mode := path.stat().st_mode) & 0o007 and name not in (_CA, _CERT):
                raise ClusterError(f"others may read {path} (mode {mode & 0o777:o}); chmod it to 600")
            text = path.read_text().strip()
        except OSError as err:
            raise ClusterError(
                f"cannot read {path}: {err.strerror}; the folder of `colm secrets` must be on every machine"
            ) from err
        if not text:
            raise ClusterError(f"{path} is empty; copy the folder of `colm secrets` once more")
        return text


def write_secrets(folder: Path) -> None:
    """Make fresh tokens, an authority and a certificate, in files that only this user can read.

    Raises:
        ClusterError: the folder is there already, or cannot be made.
    """
    tls = new_tls()
    assert tls.cert_pem is not None
    assert tls.key_pem is not None
    texts = {
        _CLIENT_TOKEN: new_token(),
        _NODE_TOKEN: new_token(),
        _CA: tls.ca_pem.decode(),
        _CERT: tls.cert_pem.decode(),
        _KEY: tls.key_pem.decode(),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(mode=0o700)
    except OSError as err:
        raise ClusterError(f"cannot make {folder}: {err.strerror}; name a folder that is not there yet") from err
    for name, text in texts.items():
        write_private(folder / name, text)
