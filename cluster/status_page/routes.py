"""The page and its figures over HTTP."""

import base64
import hashlib
import re
from pathlib import Path

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from cluster.client_tokens import Clients
from cluster.openai.errors import answer_of
from cluster.status_page.board import Board, Shown
from colm.errors import Unauthenticated
from colm.wire.security import shown_token

PAGE = Path(__file__).with_name("page.html")
_AS_JSON = TypeAdapter(Shown)


def policy_of(page: str) -> str:
    """The Content-Security-Policy under which a page runs its own script and style, and reaches its own host alone."""
    of = {
        kind: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        )
        for kind in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {of['script']}; style-src {of['style']}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )


class StatusPage:
    """Serves the page to everybody, and the figures to the operator.

    Args:
        board: has the figures.
        clients: who asks.
    """

    def __init__(self, board: Board, clients: Clients) -> None:
        self._board = board
        self._clients = clients
        self._page = PAGE.read_text(encoding="utf-8")
        self._headers = {
            "Content-Security-Policy": policy_of(self._page),
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }

    def routes(self) -> list[Route]:
        """For an application."""
        return [Route("/", self._show), Route("/status.json", self._figures)]

    async def _show(self, _: Request) -> Response:
        return HTMLResponse(self._page, headers=self._headers)

    async def _figures(self, request: Request) -> Response:
        try:
            if not self._clients.require(shown_token(request.headers)).is_operator:
                raise Unauthenticated("this token is a client's; only the operator's shows the cluster")
            shown = _AS_JSON.dump_python(await self._board.look(), mode="json")
            return JSONResponse(shown, headers={"Cache-Control": "no-store"})
        except Exception as error:  # noqa: BLE001 - whatever it is, it becomes the request's one answer
            return answer_of(error)
