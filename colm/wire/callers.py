"""Which certificate a caller must have: the right name, neither revoked nor expired when the call comes."""

import datetime
from collections.abc import Awaitable, Callable
from functools import lru_cache

import grpc
from cryptography import x509

from colm.errors import Unauthenticated
from colm.wire.certificates import names_of
from colm.wire.handlers import checked_first
from colm.wire.status import abort

_MAX_REMEMBERED = 256


class CallerInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc is untyped here
    """Lets a call through only from the member that may make it.

    That the certificate is of the right authority, TLS has seen already, once a connection. A connection may outlive
    its certificate; a call may not begin after that.

    Args:
        name: in the caller's certificate.
        revoked: serial numbers that are refused, asked for at each call.
        now: the time, with its zone.
    """

    def __init__(self, name: str, revoked: Callable[[], frozenset[int]], now: Callable[[], datetime.datetime]) -> None:
        self._name = name
        self._revoked = revoked
        self._now = now

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """The call's own handler, which looks at the certificate before anything else."""
        handler = await continuation(handler_call_details)
        return handler if handler is None else checked_first(handler, self._check)

    async def _check(self, context: grpc.aio.ServicerContext) -> None:
        shown = context.auth_context().get("x509_pem_cert")
        if not shown:
            await abort(context, Unauthenticated(f"a certificate of {self._name} is needed"))
        names, end, serial = _read(shown[0])
        if self._name not in names:
            whose = ", ".join(names) or "nobody"
            await abort(context, Unauthenticated(f"a certificate of {self._name} is needed; this one is of {whose}"))
        if serial in self._revoked():
            await abort(context, Unauthenticated(f"the certificate of {self._name} of serial {serial:x} is revoked"))
        if end <= self._now():
            await abort(
                context, Unauthenticated(f"the certificate of {self._name} expired on {end:%Y-%m-%d %H:%M} UTC")
            )


@lru_cache(maxsize=_MAX_REMEMBERED)
def _read(pem: bytes) -> tuple[tuple[str, ...], datetime.datetime, int]:
    certificate = x509.load_pem_x509_certificate(pem)
    return tuple(names_of(certificate)), certificate.not_valid_after_utc, certificate.serial_number
