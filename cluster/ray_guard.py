"""Whether a Ray cluster that is to be joined demands its token of everybody who calls it."""

import os
from collections.abc import Iterable

import grpc

from colm.errors import ClusterError

_CALL_TIMEOUT_S = 10.0
# Calls that change nothing. Both are refused without a token in token mode.
_ASK_GCS = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_ASK_NODE = "/ray.rpc.NodeManagerService/GetSystemConfig"


def check_token_mode(gcs_address: str, node_addresses: Iterable[str]) -> None:
    """Ask Ray's control store and each of its nodes without a token, and expect to be refused.

    What this process's environment says proves nothing: each node goes by its own.

    Raises:
        ClusterError: one of them answers, or cannot be asked.
    """
    for address, method in [(gcs_address, _ASK_GCS), *((address, _ASK_NODE) for address in node_addresses)]:
        if (problem := _problem(address, method)) is not None:
            raise ClusterError(
                f"Ray at {address} {problem}, and whoever reaches an open Ray can run code on it: stop it, make a "
                "token with `ray get-auth-token --generate`, copy it to ~/.ray/auth_token on every machine, and start "
                "Ray there with RAY_AUTH_MODE=token; or give --insecure-ray, on a network without strangers"
            )


def _problem(address: str, method: str) -> str | None:
    with _channel(address) as channel:
        try:
            channel.unary_unary(method)(b"", timeout=_CALL_TIMEOUT_S)
        except grpc.RpcError as err:
            code = err.code()
            if code is grpc.StatusCode.UNAUTHENTICATED:
                return None
            return f"cannot be asked whether it demands a token ({code.name})"
    return "answers without a token"


def _channel(address: str) -> grpc.Channel:
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(address)
    from ray._common.tls_utils import load_certs_from_env

    cert, key, ca = load_certs_from_env()
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert))
