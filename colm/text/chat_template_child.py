"""Renders a chat template as a process of its own, which the system ends when it takes too much.

Reads one JSON object from stdin and writes one to stdout. It is run by its path and imports nothing of the project.
"""

import json
import resource
import sys
from datetime import datetime, timedelta, timezone
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


def main() -> None:
    """Render; a template that is broken or refuses is an answer, too much time, memory or text ends the process."""
    task = json.load(sys.stdin)
    cpu_s, memory_bytes = task["cpu_s"], task["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = _render(task)
    except MemoryError:
        sys.exit(1)
    if len(answer.get("text", "")) > task["max_chars"]:
        sys.exit(1)
    json.dump(answer, sys.stdout)


def _render(task: dict[str, Any]) -> dict[str, Any]:
    now = datetime.fromisoformat(task["now"])
    now = now.replace(tzinfo=timezone(now.utcoffset() or timedelta(), task["zone"]))
    dates: dict[str, str] = {}

    def strftime_now(pattern: str) -> str:
        dates[pattern] = now.strftime(pattern)
        return dates[pattern]

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        template = environment.from_string(task["source"])
    except jinja2.TemplateSyntaxError as err:
        return {"broken": f" line {err.lineno}: {err.message}"}
    except (RecursionError, SyntaxError, ValueError) as err:  # Python's own compiler has limits too
        return {"broken": f": {err}"}
    try:
        return {"text": template.render(task["variables"]), "dates": dates}
    except MemoryError:
        raise
    except Exception as err:  # noqa: BLE001 - a template is a program, and may fail in any way
        return {"refused": str(err), "dates": dates}


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: object, indent: int | None = None) -> str:
    """JSON without jinja's escaping of HTML characters: the reader is a model, not a browser."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


if __name__ == "__main__":
    main()
