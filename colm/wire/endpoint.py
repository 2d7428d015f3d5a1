"""Servers and channels as every process of the system makes them."""

import errno
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc

from colm.clock import utc_now
from colm.wire.callers import CallerInterceptor
from colm.wire.malformed import MalformedInterceptor
from colm.wire.seal import SealedChannel
from colm.wire.security import Admits, Security, TokenInterceptor, only
from colm.wire.steady_server import SteadyServer
from colm.wire.traced import TraceInterceptor

# Tiles and document pieces stay near 1 MiB, where gRPC moves bytes fastest; the limit only stops abuse.
MAX_MESSAGE_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Keepalive:
    """How soon a peer is given up whose machine vanished or whose process was stopped. Its TCP connection looks alive.

    Both ends ping, so each must accept the other's pings however long a call is silent.
    """

    interval_ms: int = 10_000
    """Silence after which a ping is sent."""
    timeout_ms: int = 5_000
    """Longest wait for the ping's answer; after it the connection counts as lost."""


KEEPALIVE = Keepalive()
IDLE_MS = 300_000
"""A connection without calls is closed after this time; the next call opens another."""
RECONNECT_MS = 1000
"""Longest pause between two attempts of a channel to reach its peer."""
HANDSHAKE_MS = 10_000
"""Within this time a new connection has its TLS and its first HTTP/2 frames, or it is closed."""
MAX_CALLS_PER_CONNECTION = 1024
"""Calls at once over one connection; the next waits in its client. All calls between two nodes share one."""


def _common_options() -> list[tuple[str, object]]:
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE.interval_ms),
        ("grpc.keepalive_timeout_ms", KEEPALIVE.timeout_ms),
        # The timeout of every ping. Its default of a minute would override the option above.
        ("grpc.http2.ping_timeout_ms", KEEPALIVE.timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def server_options(*, shares_port: bool = False) -> list[tuple[str, object]]:
    """What every server of the system is created with.

    Args:
        shares_port: others of this user that say so too may listen on the same port; each gets some of the connections.
    """
    return [
        *_common_options(),
        # More frequent pings count as abuse, and the connection is closed. The default is five minutes.
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE.interval_ms // 2),
        # By default a second server on the same port would silently take half of the calls.
        ("grpc.so_reuseport", int(shares_port)),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", IDLE_MS),
        ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
    ]


# The wildcard addresses that a server listens on, and the loopback address at which a local client reaches it.
_LOOPBACKS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def create_server(
    security: Security,
    admits: Admits | None = None,
    now: Callable[[], datetime] = utc_now,
    *,
    shares_port: bool = False,
) -> grpc.aio.Server:
    """A server that demands what the security has: a token, a certificate. Add services, then `bind` and start it.

    Args:
        security: of the server.
        admits: whom it admits; None for whoever shows the security's own token.
        now: the time, by which callers' certificates expire.
        shares_port: as in `server_options`; `bind` must be told too.
    """
    interceptors: list[grpc.aio.ServerInterceptor] = [TraceInterceptor(), MalformedInterceptor()]
    if (tls := security.current_tls) is not None and tls.caller_name is not None:
        interceptors.insert(0, CallerInterceptor(tls.caller_name, lambda: _revoked(security), now))
    if security.token:
        interceptors.insert(0, TokenInterceptor(admits or only(security.token)))
    return SteadyServer(interceptors, server_options(shares_port=shares_port))


def _revoked(security: Security) -> frozenset[int]:
    tls = security.current_tls
    return frozenset() if tls is None else tls.revoked


def join_address(host: str, port: int) -> str:
    """host:port, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_of(address: str) -> str:
    """The host in host:port, without an IPv6 address's brackets."""
    return address.rpartition(":")[0].strip("[]")


def dial_address(host: str, port: int) -> str:
    """The address that a client on the server's own machine dials: the loopback if `host` is a wildcard."""
    return join_address(_LOOPBACKS.get(host, host), port)


def is_wildcard(host: str) -> bool:
    """Whether a server that listens on the host is reached by any address of its machine."""
    return host in _LOOPBACKS


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on the host; False for a name that does not resolve."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        return False
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)


def why_not(host: str, port: int, *, shares_port: bool = False) -> str | None:
    """Why a server on this machine could not listen on host:port now, and what to do; None if it could.

    Args:
        host: an address, or a name for one.
        port: TCP port.
        shares_port: a port that servers share counts as free.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        return f"{host!r} is no address and no name that resolves"
    refusals = [_refusal(family, address, shares_port) for family, _, _, _, address in found]
    if errno.EADDRINUSE in refusals:
        return f"port {port} is taken; choose another, 0 picks a free one"
    if errno.EACCES in refusals:
        return f"port {port} is kept for the system; choose one above 1023"
    # A name may stand for addresses of both families on a machine that has one of them.
    return None if None in refusals else f"{host!r} is not an address of this machine"


def _refusal(family: socket.AddressFamily, address: Any, shares_port: bool) -> int | None:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shares_port))
            probe.bind(address)
    except OSError as err:
        return err.errno
    return None


def bind(server: grpc.aio.Server, host: str, port: int, security: Security, *, shares_port: bool = False) -> int:
    """Listen on host:port; port 0 picks a free one.

    Args:
        server: made by `create_server`.
        host: an address of this machine, or a name for one.
        port: TCP port.
        security: of the server.
        shares_port: as the server was made.

    Returns:
        The port.

    Raises:
        OSError: the port is taken or the host is not ours; the message says which.
    """
    address = join_address(host, port)
    if (reason := why_not(host, port, shares_port=shares_port)) is not None:
        raise OSError(f"cannot listen on {address}: {reason}")
    credentials = security.server_credentials()
    try:
        if credentials is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as err:
        raise OSError(f"cannot listen on {address}") from err


def channel_options(security: Security) -> list[tuple[str, object]]:
    """What every channel of the system is opened with."""
    options = [
        *_common_options(),
        ("grpc.client_idle_timeout_ms", IDLE_MS),
        # By default a lost peer is looked for at pauses that grow to two minutes; it may be back within seconds.
        ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS // 4),
        ("grpc.max_reconnect_backoff_ms", RECONNECT_MS),
        # By default a new channel shares an older channel's lost connection and its backoff.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if (tls := security.current_tls) is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def open_channel(address: str, security: Security) -> grpc.aio.Channel:
    """A channel on the running event loop; without TLS its calls are sealed."""
    credentials = security.channel_credentials()
    if credentials is None:
        return SealedChannel(grpc.aio.insecure_channel(address, options=channel_options(security)))
    return grpc.aio.secure_channel(address, credentials, options=channel_options(security))


def open_blocking_channel(address: str, security: Security) -> grpc.Channel:
    """As `open_channel`, for threads, on which one reader moves three times as many bytes a second as on a loop."""
    credentials = security.channel_credentials()
    if credentials is None:
        return SealedChannel(grpc.insecure_channel(address, options=channel_options(security)))
    return grpc.secure_channel(address, credentials, options=channel_options(security))
