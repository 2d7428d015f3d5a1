"""Keys and certificates in files: read, checked, and refused by the file's name and what is wrong with it."""

import datetime
import ipaddress
import os
import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from colm.errors import ConfigError

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey
_MAX_PEM_BYTES = 1 << 20
_PEM = serialization.Encoding.PEM


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate with those that lead to its authority, and its key."""

    chain: tuple[x509.Certificate, ...]
    key: PrivateKey = field(repr=False)

    @property
    def leaf(self) -> x509.Certificate:
        """The certificate of the key."""
        return self.chain[0]

    @property
    def chain_pem(self) -> bytes:
        """What is shown to the other side."""
        return pem_of(self.chain)

    @property
    def key_pem(self) -> bytes:
        """The secret."""
        return key_pem_of(self.key)

    @property
    def pem(self) -> bytes:
        """Both in one text, so that they are replaced at once."""
        return self.key_pem + self.chain_pem


def key_pem_of(key: PrivateKey) -> bytes:
    """A key as a file holds it."""
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def pem_of(certificates: Iterable[x509.Certificate]) -> bytes:
    """Certificates as a file holds them."""
    return b"".join(certificate.public_bytes(_PEM) for certificate in certificates)


def read_certificates(path: Path) -> tuple[x509.Certificate, ...]:
    """All certificates of a PEM file; anything else in it is passed over.

    Raises:
        ConfigError: it cannot be read, or has none.
    """
    try:
        return tuple(x509.load_pem_x509_certificates(_read(path)))
    except ValueError as err:
        raise ConfigError(f"{path} holds no certificate in PEM form: {err}") from err


def read_pair(certificate: Path, key: Path, now: datetime.datetime) -> Pair:
    """A certificate and its key, from two files or from one that holds both.

    Raises:
        ConfigError: one of them cannot be read, the key is another's or open to others, or its time is over or has not
            come; named with the file.
    """
    return _checked(Pair(read_certificates(certificate), _read_key(key)), certificate, key, now)


def read_signer(certificates: Path, key: Path, now: datetime.datetime) -> Pair:
    """As `read_pair`, where the key's certificate may stand anywhere among those of a file."""
    secret = _read_key(key)
    found = sorted(read_certificates(certificates), key=lambda each: each.public_key() != secret.public_key())
    return _checked(Pair(tuple(found), secret), certificates, key, now)


def _checked(pair: Pair, certificate: Path, key: Path, now: datetime.datetime) -> Pair:
    if pair.key.public_key() != pair.leaf.public_key():
        raise ConfigError(f"the key in {key} is not that of the certificate in {certificate}; give both of one pair")
    if (end := pair.leaf.not_valid_after_utc) <= now:
        raise ConfigError(f"the certificate in {certificate} expired on {end:%Y-%m-%d %H:%M} UTC; renew it")
    if (begin := pair.leaf.not_valid_before_utc) > now:
        raise ConfigError(f"the certificate in {certificate} is valid only from {begin:%Y-%m-%d %H:%M} UTC on")
    return pair


def system_authorities() -> bytes:
    """The authorities that this system trusts, as OpenSSL finds them.

    Raises:
        ConfigError: it has none.
        OSError: their file cannot be read.
    """
    found = ssl.get_default_verify_paths()
    if found.cafile:
        return Path(found.cafile).read_bytes()
    if found.capath and (files := sorted(Path(found.capath).glob("*.pem"))):
        return b"".join(path.read_bytes() for path in files)
    raise ConfigError(
        "this system has no authorities where OpenSSL looks for them; set SSL_CERT_FILE to a file of them"
    )


def is_open_to_group(key: Path) -> bool:
    """Whether other users of the file's group may read it."""
    return bool(key.stat().st_mode & 0o070)


def names_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a certificate is for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = [str(address) for address in found.get_values_for_type(x509.IPAddress)]
    return found.get_values_for_type(x509.DNSName) + addresses


def signer_of(certificate: x509.Certificate) -> str:
    """Who signed a certificate; see `signer_name`."""
    try:
        named = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    except x509.ExtensionNotFound:
        return signer_name(certificate.issuer, None)
    return signer_name(certificate.issuer, named.key_identifier)


def signer_name(name: x509.Name, key_id: bytes | None) -> str:
    """An authority to people: its common name and eight hex digits of its key's id, as far as they are known."""
    common = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    shown = str(common[0].value) if common else name.rfc4514_string()
    return f"{shown} {key_id.hex()[:8]}" if key_id else shown


def dialled_name(certificate: x509.Certificate) -> str:
    """A name that a certificate covers.

    Raises:
        ConfigError: it covers none.
    """
    if not (names := names_of(certificate)):
        raise ConfigError("the certificate is for no name and no address; one with subjectAltName is needed")
    return names[0].replace("*", "gateway")


def covers(certificate: x509.Certificate, host: str) -> bool:
    """Whether a certificate is for a host, which is a name or an address."""
    names = names_of(certificate)
    try:
        return str(ipaddress.ip_address(host)) in names
    except ValueError:
        wanted = host.lower().rstrip(".")
        wildcard = "*." + wanted.partition(".")[2]
        return any(name.lower() in (wanted, wildcard) for name in names)


def _read_key(path: Path) -> PrivateKey:
    data = _read(path)
    if (mode := path.stat().st_mode) & 0o007:
        raise ConfigError(f"others may read the key in {path} (mode {mode & 0o777:o}); chmod it to 600")
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except TypeError as err:
        raise ConfigError(f"the key in {path} is encrypted, and nobody is there to type its password") from err
    except ValueError as err:
        raise ConfigError(f"{path} holds no private key in PEM form") from err
    if not isinstance(key, PrivateKey):
        raise ConfigError(f"the key in {path} is neither RSA nor ECDSA; make one of these")
    return key


def _read(path: Path) -> bytes:
    try:
        # A pipe in its place is not waited for.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read(_MAX_PEM_BYTES)
    except OSError as err:
        raise ConfigError(f"cannot read {path}: {err.strerror}") from err
