"""One mutation of the serving path. It must make its test fail, or that test proves nothing about it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of the source.

    Attributes:
        name: the behaviour that the mutation breaks.
        path: the file, from the repository root.
        old: text that the file has exactly once.
        new: the text that replaces it.
        test: pytest's node id, without parameters, of a test that must fail.
    """

    name: str
    path: str
    old: str
    new: str
    test: str
