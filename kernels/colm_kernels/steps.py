"""Long work in short steps, so that whoever asked for it can do something else in between, or give it up."""

from collections.abc import Generator
from typing import TypeVar

_T = TypeVar("_T")

Steps = Generator[None, None, _T]
"""Pauses after each step, and returns its result at the end. Dropped in a pause, the work ends there."""


def all_at_once(steps: Steps[_T]) -> _T:
    """The result, without a pause."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: _T = end.value
            return result
