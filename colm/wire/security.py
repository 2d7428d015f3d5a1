"""Who may call: bearer tokens, and TLS with certificates of the cluster's own authority or of the user's."""

import hmac
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import grpc

from colm import tracing
from colm.clock import utc_now
from colm.errors import ConfigError
from colm.wire.authority import Authority
from colm.wire.handlers import with_behaviour
from colm.wire.members import CLUSTER_NAME, Member

AUTHORIZATION = "authorization"
_OPEN_SERVICES = ("/grpc.health.v1.Health/",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tls:
    """PEM material of one side. Clients need `ca_pem`; servers need a certificate and its key."""

    ca_pem: bytes
    cert_pem: bytes | None = None
    """Shown to callers, and to servers that demand one."""
    key_pem: bytes | None = field(default=None, repr=False)
    server_name: str | None = CLUSTER_NAME
    """The name in the certificates of the servers that are called; None checks the address that was dialled."""
    caller_name: str | None = None
    """The name in the certificate that a server demands of its callers; None demands none."""
    revoked: frozenset[int] = frozenset()
    """Serial numbers of certificates that call no more, whatever their end."""

    def current(self) -> "Tls":
        """Itself: see `TlsSource`."""
        return self

    def for_clients(self) -> "Tls":
        """The part that clients may know."""
        return Tls(ca_pem=self.ca_pem, server_name=self.server_name)


class TlsSource(Protocol):
    """Where certificates come from that may be renewed."""

    def current(self) -> Tls:
        """Those of now: the same object as before while nothing has changed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Security:
    """What a caller shows and a server demands."""

    token: str | None = None
    """Sent as `authorization: Bearer`; None leaves the server open."""
    tls: TlsSource | None = None
    """None is plaintext."""

    def __post_init__(self) -> None:
        if self.token == "":
            raise ValueError("the token is empty; None leaves the server open")

    def __repr__(self) -> str:
        return f"Security(token={'set' if self.token else None}, tls={'set' if self.tls else None})"

    @property
    def current_tls(self) -> Tls | None:
        """The certificates of now; None for plaintext."""
        return None if self.tls is None else self.tls.current()

    def current(self) -> "Security":
        """The same with the certificates of now, which stay what they are."""
        return replace(self, tls=self.current_tls)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata that a call carries: the token, and the trace that it is part of."""
        return (*(((AUTHORIZATION, f"Bearer {self.token}"),) if self.token else ()), *tracing.headers())

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """Credentials that follow the certificates as they are renewed; None for plaintext."""
        source = self.tls
        if source is None:
            return None
        served = source.current()

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            # gRPC asks at every handshake, one at a time, and keeps what it has where the answer is None.
            nonlocal served
            if (now := source.current()) is served:
                return None
            served = now
            return _served(now)

        demands = served.caller_name is not None
        return grpc.dynamic_ssl_server_credentials(_served(served), renewed, require_client_authentication=demands)

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """Those of now, for one channel; None for plaintext."""
        tls = self.current_tls
        return None if tls is None else grpc.ssl_channel_credentials(tls.ca_pem, tls.key_pem, tls.cert_pem)


def _served(tls: Tls) -> grpc.ServerCertificateConfiguration:
    if tls.key_pem is None or tls.cert_pem is None:
        raise ValueError("tls.cert_pem and tls.key_pem are needed to serve")
    trusted = None if tls.caller_name is None else tls.ca_pem
    return grpc.ssl_server_certificate_configuration([(tls.key_pem, tls.cert_pem)], root_certificates=trusted)


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


def new_tls(member: Member = Member.PUBLIC, authority: Authority | None = None) -> Tls:
    """A fresh certificate of a member, by a fresh authority unless one is given, that no file holds."""
    now = utc_now()
    authority = authority or Authority.new(now)
    issued = authority.issue(member, now)
    return Tls(
        ca_pem=authority.certificate_pem,
        cert_pem=issued.chain_pem,
        key_pem=issued.key_pem,
        server_name=member.callee.certificate_name if member.callee else CLUSTER_NAME,
        caller_name=member.caller.certificate_name if member.caller else None,
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

    return with_behaviour(handler, refuse)
