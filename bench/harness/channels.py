"""gRPC's own channels, with the options that the nodes' have and without the checksums of plaintext.

What is sent over them is what the server gets, which may be no message of ours.
"""

import grpc

from colm.wire.endpoint import channel_options
from colm.wire.security import Security


def bare_channel(address: str, security: Security) -> grpc.aio.Channel:
    """A channel on the running event loop."""
    credentials, options = security.channel_credentials(), channel_options(security)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def bare_blocking_channel(address: str, security: Security) -> grpc.Channel:
    """The same for threads."""
    credentials, options = security.channel_credentials(), channel_options(security)
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials, options=options)
