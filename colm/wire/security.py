"""Who may call: bearer tokens, and TLS with certificates that the cluster makes for itself."""

import datetime
import hmac
import ipaddress
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from colm.errors import ConfigError

AUTHORIZATION = "authorization"
# Self-made certificates carry this name instead of addresses, so they stay valid wherever a replica lands.
CLUSTER_NAME = "colm-serve"
_OPEN_SERVICES = ("/grpc.health.v1.Health/",)
# A cluster makes new ones whenever it starts.
_VALID_DAYS = 397


@dataclass(frozen=True, kw_only=True, slots=True)
class Tls:
    """PEM material of one side. Clients need `ca_pem`; servers need all three."""

    ca_pem: bytes
    cert_pem: bytes | None = None
    key_pem: bytes | None = field(default=None, repr=False)
    server_name: str | None = CLUSTER_NAME
    """The name in the server's certificate; None checks the address that was dialled."""

    def for_clients(self) -> "Tls":
        """The part that clients may know."""
        return Tls(ca_pem=self.ca_pem, server_name=self.server_name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Security:
    """What a caller shows and a server demands."""

    token: str | None = None
    """Sent as `authorization: Bearer`; None leaves the server open."""
    tls: Tls | None = None
    """None is plaintext."""

    def __post_init__(self) -> None:
        if self.token == "":
            raise ValueError("the token is empty; None leaves the server open")

    def __repr__(self) -> str:
        return f"Security(token={'set' if self.token else None}, tls={'set' if self.tls else None})"

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata that a call carries."""
        return ((AUTHORIZATION, f"Bearer {self.token}"),) if self.token else ()

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """None for plaintext."""
        if self.tls is None:
            return None
        if self.tls.key_pem is None or self.tls.cert_pem is None:
            raise ValueError("tls.cert_pem and tls.key_pem are needed to serve")
        return grpc.ssl_server_credentials([(self.tls.key_pem, self.tls.cert_pem)])

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """None for plaintext."""
        return None if self.tls is None else grpc.ssl_channel_credentials(self.tls.ca_pem)


def new_token() -> str:
    """A fresh random token, 256 bits."""
    return secrets.token_urlsafe(32)


def read_token(path: Path) -> str:
    """The token that a file holds, without space around it.

    Raises:
        ConfigError: the file has none, or something that no call can carry.
        OSError: it cannot be read.
    """
    token = path.read_bytes().strip()
    if not token:
        raise ConfigError(f"{path} is empty; write a token into it, or leave the option out")
    if not all(0x21 <= byte <= 0x7E for byte in token):
        raise ConfigError(f"{path} must hold a token: one line of printable ASCII without spaces")
    return token.decode("ascii")


def new_tls() -> Tls:
    """A fresh self-made authority and a server certificate signed by it, both valid 397 days."""
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{CLUSTER_NAME} authority")])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, CLUSTER_NAME)])

    def certificate(subject: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=_VALID_DAYS))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        )

    ca = (
        certificate(ca_name, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    names: list[x509.GeneralName] = [x509.DNSName(CLUSTER_NAME), x509.DNSName("localhost")]
    names += [x509.IPAddress(ipaddress.ip_address(loopback)) for loopback in ("127.0.0.1", "::1")]
    cert = (
        certificate(name, key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    return Tls(
        ca_pem=ca.public_bytes(pem),
        cert_pem=cert.public_bytes(pem),
        key_pem=key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


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


_SCHEME = "Bearer "

Admits = Callable[[str], bool]
"""Whether a server admits whoever shows this token."""


def only(token: str) -> Admits:
    """Admits one token, in a time that does not depend on how much of it is right."""
    expected = token.encode()
    return lambda shown: hmac.compare_digest(shown.encode(), expected)


def shown_token(metadata: Any) -> str:
    """The token that a call's metadata shows; empty without one."""
    shown = str(dict(metadata or ()).get(AUTHORIZATION, ""))
    return shown.removeprefix(_SCHEME) if shown.startswith(_SCHEME) else ""


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc is untyped here
    """Lets a call through only with a token that is admitted; health checks need none."""

    def __init__(self, admits: Admits) -> None:
        self._admits = admits

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """The call's own handler if its token is right, else one of the same kind that answers UNAUTHENTICATED."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_OPEN_SERVICES):
            return handler
        metadata = handler_call_details.invocation_metadata
        if (shown := shown_token(metadata)) and self._admits(shown):
            return handler
        is_shown = AUTHORIZATION in dict(metadata)
        return _refusal(
            handler, "the token is wrong" if is_shown else "a token is needed (metadata `authorization: Bearer`)"
        )


def _refusal(handler: grpc.RpcMethodHandler, why: str) -> grpc.RpcMethodHandler:
    async def refuse(_: object, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, why)

    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = kinds[(handler.request_streaming, handler.response_streaming)]
    return make(refuse, handler.request_deserializer, handler.response_serializer)
