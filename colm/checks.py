"""Checks of values that a caller passes; a refusal names the field, the value and the limit."""

import math
from numbers import Integral, Real

from colm.errors import InvalidRequest


def integer(field: str, value: object, allowed: range, limit: str) -> int:
    """An integer of any type but bool.

    Raises:
        InvalidRequest: it is something else, or outside `allowed`.
    """
    # int stands beside its abstract class because that check is the fast one, and prompts have many ids.
    if isinstance(value, bool) or not isinstance(value, int | Integral) or int(value) not in allowed:
        raise InvalidRequest(field, value, limit)
    return int(value)


def number(field: str, value: object, limit: str) -> float:
    """A finite number of any type but bool.

    Raises:
        InvalidRequest: it is something else.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            if math.isfinite(checked := float(value)):
                return checked
        except OverflowError:
            pass
    raise InvalidRequest(field, value, limit)


def flag(field: str, value: object) -> bool:
    """True or False.

    Raises:
        InvalidRequest: it is something else.
    """
    if not isinstance(value, bool):
        raise InvalidRequest(field, value, "must be True or False")
    return value


def choice(field: str, value: object, allowed: tuple[str, ...]) -> str:
    """One of some words.

    Raises:
        InvalidRequest: it is something else.
    """
    if not isinstance(value, str) or value not in allowed:
        raise InvalidRequest(field, value, f"must be {' or '.join(allowed)}")
    return value


def utf8(field: str, value: object) -> bytes:
    """The bytes of a text.

    Raises:
        InvalidRequest: it is something else, or has surrogates that stand alone.
    """
    if not isinstance(value, str):
        raise InvalidRequest(field, value, "must be a str")
    try:
        return value.encode()
    except UnicodeEncodeError as err:
        shown = value[err.start : err.start + 8]
        raise InvalidRequest(
            field, shown, f"must be text; character {err.start} is half a surrogate pair, which UTF-8 cannot carry"
        ) from err
