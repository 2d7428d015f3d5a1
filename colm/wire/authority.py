"""The authority of a cluster: makes itself, or is read from files, and issues the certificates of the members."""

import datetime
import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from colm.errors import ConfigError
from colm.wire.certificates import Pair, PrivateKey, PublicKey, key_pem_of, pem_of, read_signer, signer_name
from colm.wire.members import CLUSTER_NAME, Member

# A cluster makes a new authority whenever it starts, and when it is told to.
_AUTHORITY_DAYS = 397
CERTIFICATE_DAYS = 90
"""How long a member's certificate is valid, unless its authority ends sooner."""


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate that signs others, and its key."""

    certificate: x509.Certificate
    key: PrivateKey = field(repr=False)
    above: tuple[x509.Certificate, ...] = ()
    """What follows its own in a member's chain, for those who trust another authority: that one's word for this."""

    @classmethod
    def new(cls, now: datetime.datetime) -> "Authority":
        """A fresh self-made one."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"{CLUSTER_NAME} authority")
        named = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
        builder = _builder(name, name, key.public_key(), named, now)
        builder = builder.not_valid_after(now + datetime.timedelta(days=_AUTHORITY_DAYS))
        # One for the authority that will take its place: that is self-issued, which not every verifier leaves out.
        return cls(_as_authority(builder, path_length=1).sign(key, hashes.SHA256()), key)

    @classmethod
    def read(cls, certificate: Path, key: Path, now: datetime.datetime) -> "Authority":
        """One that lies in files.

        Args:
            certificate: of the authority, in any place among others.
            key: its key.
            now: the time.

        Raises:
            ConfigError: names the file and what is wrong with it.
        """
        pair = read_signer(certificate, key, now)
        try:
            may_sign = pair.leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
            usage = pair.leaf.extensions.get_extension_for_class(x509.KeyUsage).value
            may_sign = may_sign and usage.key_cert_sign
        except x509.ExtensionNotFound as missing:
            may_sign = may_sign if missing.oid == x509.KeyUsage.oid else False
        if not may_sign:
            raise ConfigError(f"{certificate} is not of an authority (CA:TRUE); its certificate may sign no others")
        has_another_above = pair.leaf.issuer != pair.leaf.subject
        return cls(pair.leaf, pair.key, (pair.leaf,) if has_another_above else ())

    @property
    def certificate_pem(self) -> bytes:
        """What others trust."""
        return pem_of([self.certificate])

    @property
    def key_pem(self) -> bytes:
        """The secret."""
        return key_pem_of(self.key)

    @property
    def name(self) -> str:
        """As `signer_of` says it of what this one signed."""
        return signer_name(self.certificate.subject, self._named.key_identifier)

    @property
    def _named(self) -> x509.AuthorityKeyIdentifier:
        """How certificates name its key: as its own certificate does, if that does."""
        try:
            found = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        except x509.ExtensionNotFound:
            return x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(found)

    def vouch_for(self, other: "Authority", until: datetime.datetime, now: datetime.datetime) -> x509.Certificate:
        """Another authority of the same name, signed by this one: whoever trusts this one trusts the other by it.

        RFC 4210 calls it NewWithOld.
        """
        end = min(until, self.certificate.not_valid_after_utc, other.certificate.not_valid_after_utc)
        builder = _builder(
            other.certificate.subject, self.certificate.subject, other.key.public_key(), self._named, now
        ).not_valid_after(end)
        return _as_authority(builder, path_length=0).sign(self.key, hashes.SHA256())

    def issue(self, member: Member, now: datetime.datetime) -> Pair:
        """A fresh key and the certificate for it; what is above the authority follows."""
        key = ec.generate_private_key(ec.SECP256R1())
        end = min(now + datetime.timedelta(days=CERTIFICATE_DAYS), self.certificate.not_valid_after_utc)
        names: list[x509.GeneralName] = [x509.DNSName(member.certificate_name)]
        if member is Member.PUBLIC:  # for clients that check the address that they dial
            names += [x509.DNSName("localhost")]
            names += [x509.IPAddress(ipaddress.ip_address(loopback)) for loopback in ("127.0.0.1", "::1")]
        subject, issuer = _name(member.certificate_name), self.certificate.subject
        certificate = (
            _builder(subject, issuer, key.public_key(), self._named, now)
            .not_valid_after(end)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(member.usages), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return Pair((certificate, *self.above), key)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: PublicKey,
    named: x509.AuthorityKeyIdentifier,
    now: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks differ
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(named, critical=False)
    )


def _as_authority(builder: x509.CertificateBuilder, *, path_length: int) -> x509.CertificateBuilder:
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
    return builder.add_extension(_usage(signs_certificates=True), critical=True)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
