"""The options of a cluster as texts to read: a file to start from, and the page docs/options.md.

Both are made from the options themselves, whose docstrings are the only place that says what each means.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ByteSize

from cluster.options import ClusterConfig

_PAGE_HEAD: Final = """# Options

Written by `colm config --markdown`; each text is its option's docstring. `colm config > colm.toml` prints the same as a
file to start from, `colm up --config colm.toml` reads it, and `colm up` on a cluster that is up applies what differs
([operate.md](operate.md)). Bytes may have a unit, as in `"8GiB"`. A dash stands for no default. An option that does not
exist, or a value that is not allowed, is refused by name before anything starts. `colm up --help`, `python -m
prefill_node --help` and `python -m decode_node --help` list those that are flags too.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One option, as its settings class declares it."""

    section: str
    name: str
    default: object
    meaning: str
    """Its docstring; may have several lines."""
    schema: dict[str, Any]
    """JSON schema of its value, null left out."""


def options() -> Iterator[Option]:
    """Every option, in the file's order."""
    schema = ClusterConfig.model_json_schema()
    for section, field in ClusterConfig.model_fields.items():
        defaults = field.get_default()
        properties = schema["$defs"][type(defaults).__name__]["properties"]
        for name, option in type(defaults).model_fields.items():
            yield Option(
                section=section,
                name=name,
                default=getattr(defaults, name),
                meaning=option.description or "",
                schema=_not_null(properties[name]),
            )


def default_toml() -> str:
    """TOML that lists every option with its description and its default, commented out."""
    lines = ["# Options of `colm up --config FILE`. What is commented out shows the default."]
    section = ""
    for option in options():
        if option.section != section:
            section = option.section
            lines += ["", f"[{section}]"]
        lines += [*(f"# {line}" for line in option.meaning.splitlines()), f"# {option.name} = {_toml(option.default)}"]
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/options.md: a table for each section."""
    lines = [_PAGE_HEAD.rstrip("\n")]
    section = ""
    for option in options():
        if option.section != section:
            section = option.section
            lines += ["", f"## `[{section}]`", "", "| option | default | values | meaning |", "|---|---|---|---|"]
        default = "-" if option.default is None else f"`{_toml(option.default)}`"
        meaning = " ".join(option.meaning.split()).replace("|", "\\|")
        lines.append(f"| `{option.name}` | {default} | {_values(option)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def _values(option: Option) -> str:
    """What may be given, in words; what a docstring must add is not here."""
    schema = option.schema
    if "enum" in schema:
        return ", ".join(f'`"{value}"`' for value in schema["enum"])
    if "anyOf" in schema:  # pydantic's ByteSize takes a number or a text with a unit
        return "bytes"
    if "pattern" in schema:
        return "text"
    if schema.get("type") == "object":
        return "sections"
    kind = {"boolean": "`true`, `false`", "integer": "whole number", "number": "number"}.get(schema["type"])
    if kind is None:
        return "path" if schema.get("format") == "path" else "text"
    low, high, above = (schema.get(key) for key in ("minimum", "maximum", "exclusiveMinimum"))
    if above is not None:
        return f"{kind} above {above}" + ("" if high is None else f", up to {high}")
    if high is not None:
        return f"{kind}, {low} to {high}"
    return kind if low is None else f"{kind}, {low} or more"


def _toml(value: object) -> str:
    match value:
        case None:
            return "..."
        case bool():
            return str(value).lower()
        case ByteSize():
            return f'"{value.human_readable(separator="")}"'
        case str():
            return f'"{value}"'
        case dict():
            assert not value, "no table has entries by default"
            return "{}"
        case _:
            return str(value)
