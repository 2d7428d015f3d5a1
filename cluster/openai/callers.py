"""Who makes a request over HTTP."""

from starlette.requests import Request

from cluster.client_tokens import Client, Clients
from colm.errors import Unauthenticated
from colm.wire.security import AUTHORIZATION, shown_token


def caller_of(request: Request, clients: Clients) -> Client:
    """The client whose token a request shows.

    Raises:
        Unauthenticated: it shows none, or a wrong one.
    """
    shown = request.headers.get(AUTHORIZATION, "")
    client = clients.of(shown_token({AUTHORIZATION: shown}))
    if client is None:
        why = "the token is wrong" if shown else "a token is needed (header `Authorization: Bearer`)"
        raise Unauthenticated(why)
    return client
