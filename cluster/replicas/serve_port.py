"""Keeps shut the port that Ray Serve opens in every replica for calls over gRPC, which nobody makes here (ADR 1)."""

from ray.serve._private import replica


def keep_serve_port_shut() -> None:
    """Call in a replica's `__init__`: when that has ended, Serve would listen on all interfaces and unpickle requests.

    Serve has no option for it. It tells the port to its handles, which use it only if they are asked to.
    """
    replica.add_port_to_grpc_server = lambda _server, _address: 0
