"""A checkpoint's chat template: a program that a stranger wrote, rendered by a child process with limits."""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from colm.child import TookTooMuch, ask_child
from colm.errors import CheckpointError, InvalidRequest
from colm.request import ChatRole

_CHILD = Path(__file__).with_name("chat_template_child.py")
_CPU_S = 2
"""Its start included, which takes 0.2 s."""
_MEMORY_BYTES = 256 << 20
_MAX_CHARS = 1 << 20
MAX_KEPT = 64
"""Sequences of roles whose text is kept."""


class ChatTemplate:
    """A template whose text depends on who speaks, in turn, but not on what is said: that goes in place of markers.

    So it is rendered once for each sequence of roles, and again when the date that it asked for has changed. A
    conversation of one user's message is rendered at once.

    Args:
        source: Jinja, as in tokenizer_config.json.
        variables: what it is rendered with besides `messages`; JSON.
        content: what stands for the content of the message of that number.
        now: what templates that write today's date are told.

    Raises:
        CheckpointError: the template is broken, or takes too much time or memory.
    """

    def __init__(
        self, source: str, variables: Mapping[str, object], content: Callable[[int], str], now: Callable[[], datetime]
    ) -> None:
        self._source = source
        self._variables = dict(variables)
        self._content = content
        self._now = now
        self._lock = threading.Lock()
        self._rendered: OrderedDict[tuple[ChatRole, ...], dict[str, Any]] = OrderedDict()
        self._render(("user",), now())

    def text(self, roles: tuple[ChatRole, ...] = ("user",)) -> str:
        """The template's text as of now, for a conversation in which these speak; from any thread.

        Raises:
            InvalidRequest: the template refuses such a conversation.
            CheckpointError: it takes too much time or memory.
        """
        now = self._now()
        with self._lock:
            rendered = self._rendered.get(roles)
        if rendered is None or any(now.strftime(each) != written for each, written in rendered["dates"].items()):
            rendered = self._render(roles, now)
        if "refused" in rendered:
            limit = f"the chat template refused the message: {rendered['refused']}; use raw completion"
            raise InvalidRequest("chat", True, limit)
        return str(rendered["text"])

    def _render(self, roles: tuple[ChatRole, ...], now: datetime) -> dict[str, Any]:
        """Render by a child, and keep what came of it; of several threads that do so at once, any one's."""
        rendered = self._by_child(roles, now)
        with self._lock:
            self._rendered[roles] = rendered
            self._rendered.move_to_end(roles)
            while len(self._rendered) > MAX_KEPT:
                self._rendered.popitem(last=False)
        return rendered

    def _by_child(self, roles: tuple[ChatRole, ...], now: datetime) -> dict[str, Any]:
        messages = [{"role": role, "content": self._content(number)} for number, role in enumerate(roles)]
        task = {
            "source": self._source,
            "variables": self._variables | {"messages": messages},
            "now": now.isoformat(),
            "zone": now.tzname() or "UTC",
            "cpu_s": _CPU_S,
            "memory_bytes": _MEMORY_BYTES,
            "max_chars": _MAX_CHARS,
        }
        try:
            answer = ask_child([str(_CHILD)], json.dumps(task).encode())
        except TookTooMuch as err:
            raise CheckpointError(
                f"text.chat_template takes more than {_CPU_S} s of CPU time, {_MEMORY_BYTES >> 20} MiB of memory or "
                f"{_MAX_CHARS >> 20} MiB of text; import the model again with another one"
            ) from err
        if not _is_text(str(answer.get("text", ""))):
            raise CheckpointError("text.chat_template writes half a surrogate pair; import the model again")
        if "broken" in answer:
            raise CheckpointError(f"text.chat_template{answer['broken']}; import the model again")
        return answer


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
