"""A checkpoint's chat template: a program that a stranger wrote, rendered by a child process with limits."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from colm.errors import CheckpointError, InvalidRequest

_CHILD = Path(__file__).with_name("chat_template_child.py")
_CPU_S = 2
"""Its start included, which takes 0.2 s."""
_MEMORY_BYTES = 256 << 20
_MAX_CHARS = 1 << 20
_TIMEOUT_S = 60.0
"""For a child that the machine gives no CPU time; one that computes ends long before."""


class ChatTemplate:
    """A template with its variables, which are always the same: only a date in its text changes.

    So it is rendered once, and again when the date that it asked for has changed.

    Args:
        source: Jinja, as in tokenizer_config.json.
        variables: what it is rendered with; JSON.
        now: what templates that write today's date are told.

    Raises:
        CheckpointError: the template is broken, or takes too much time or memory.
    """

    def __init__(self, source: str, variables: Mapping[str, object], now: Callable[[], datetime]) -> None:
        self._source = source
        self._variables = dict(variables)
        self._now = now
        self._rendered = self._render(now())

    def text(self) -> str:
        """The template's text as of now.

        Raises:
            InvalidRequest: the template refuses its variables.
            CheckpointError: it takes too much time or memory.
        """
        now, rendered = self._now(), self._rendered
        if any(now.strftime(pattern) != written for pattern, written in rendered["dates"].items()):
            self._rendered = rendered = self._render(now)
        if "refused" in rendered:
            limit = f"the chat template refused the message: {rendered['refused']}; use raw completion"
            raise InvalidRequest("chat", True, limit)
        return str(rendered["text"])

    def _render(self, now: datetime) -> dict[str, Any]:
        task = {
            "source": self._source,
            "variables": self._variables,
            "now": now.isoformat(),
            "zone": now.tzname() or "UTC",
            "cpu_s": _CPU_S,
            "memory_bytes": _MEMORY_BYTES,
            "max_chars": _MAX_CHARS,
        }
        try:
            child = subprocess.run(
                [sys.executable, "-P", str(_CHILD)],
                input=json.dumps(task).encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=_TIMEOUT_S,
                check=True,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as err:
            raise CheckpointError(
                f"text.chat_template takes more than {_CPU_S} s of CPU time, {_MEMORY_BYTES >> 20} MiB of memory or "
                f"{_MAX_CHARS >> 20} MiB of text; import the model again with another one"
            ) from err
        answer: dict[str, Any] = json.loads(child.stdout)
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
