"""What a regular expression of a tokenizer may cost: how a matcher that backtracks fares on the worst text.

Strangers write them, and the library's matcher tries every way in which a text may match. Only what is understood here
is accepted: the syntax of published tokenizers, a small part of Oniguruma's.
"""

import re
from dataclasses import dataclass, replace
from typing import Final

_MAX_CHARS: Final = 2048
_MAX_REPEATS: Final = 64
_MAX_WAYS: Final = 256
_MAX_DEPTH: Final = 16

_BOUNDS = re.compile(r"\{(\d{0,3})(,?)(\d{0,3})\}")
_ESCAPE = re.compile(r"\\(?:[pP]\{\^?[A-Za-z_ ]{1,32}\}|x[0-9A-Fa-f]{2}|x\{[0-9A-Fa-f]{1,6}\}|u[0-9A-Fa-f]{4})")
_OPENING = re.compile(r"\((?:\?(?:[im]{0,2}(?:-[im]{1,2})?:|=|!|<=|<!|>))?")
_PLAIN_LETTERS: Final = "sSdDwWhHbBAzZGnrtfvae"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """How often the matcher looks at a character, at worst, from one place of a text."""

    ways: int = 1
    """In how many ways bounded choices can be taken."""
    degree: int = 0
    """How often that is multiplied by the number of characters that follow. Of 0, a whole text takes time for its
    length; of 1, for the square of it."""
    reads_spaces: bool = False
    """One of these times is for a run of spaces."""


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: "tuple[_Node, ...]"


@dataclass(frozen=True, slots=True)
class _Choice:
    branches: "tuple[_Node, ...]"


@dataclass(frozen=True, slots=True)
class _Look:
    """Looks ahead or behind, and takes nothing."""

    body: "_Node"


@dataclass(frozen=True, slots=True)
class _Repeat:
    body: "_Node"
    fewest: int
    most: int | None


@dataclass(frozen=True, slots=True)
class _Atom:
    """One character, or a place between two."""

    is_space: bool = False


_SPACE: Final = _Atom(is_space=True)
_Node = _Sequence | _Choice | _Look | _Repeat | _Atom


def cost_of(regex: str) -> Cost:
    """What a search costs at one place of a text.

    Raises:
        ValueError: more than the number of characters that follow, times a constant; or syntax that is not understood.
    """
    if len(regex) > _MAX_CHARS:
        raise ValueError(f"a regular expression has more than {_MAX_CHARS} characters")
    whole = _Parser(regex).whole()
    branches = whole.branches if isinstance(whole, _Choice) else (whole,)
    costs = [_cost(branch, followed=False) for branch in branches]
    # A run of spaces that was read in vain is taken whole by this branch, and not read again.
    takes_spaces = _Sequence((_Repeat(_SPACE, 1, None),)) in branches
    degree = max(cost.degree - (takes_spaces and cost.reads_spaces) for cost in costs)
    cost = Cost(ways=sum(cost.ways for cost in costs), degree=degree)
    if cost.degree > 1 or cost.ways > _MAX_WAYS:
        raise ValueError(f"the regular expression {regex!r:.80} may take far longer than the text is long")
    return cost


def _cost(node: _Node, *, followed: bool) -> Cost:
    """Cost of a node; `followed` by something that may fail, so that what it has read was in vain."""
    match node:
        case _Sequence():
            whole = Cost()
            for part in reversed(node.parts):
                cost = _cost(part, followed=followed)
                whole = Cost(
                    ways=whole.ways * cost.ways,
                    degree=whole.degree + cost.degree,
                    reads_spaces=whole.reads_spaces or cost.reads_spaces,
                )
                followed = followed or _may_fail(part)
            return whole
        case _Choice(branches):
            costs = [_cost(branch, followed=followed) for branch in branches]
            return Cost(
                ways=sum(cost.ways for cost in costs),
                degree=max(cost.degree for cost in costs),
                reads_spaces=all(cost.reads_spaces for cost in costs),
            )
        case _Look(body):
            # It takes nothing of what it has read, and so the next place reads it again.
            return replace(_cost(body, followed=True), reads_spaces=False)
        case _Repeat(body, _, None):
            if _cost(body, followed=True) != Cost():
                raise ValueError("a regular expression repeats without end what may match in several ways")
            return Cost(degree=int(followed), reads_spaces=followed and body == _SPACE)
        case _Repeat(body, fewest, int(most)):
            cost = _cost(body, followed=followed or most > 1)
            if most == 1:
                return replace(cost, ways=cost.ways + 1 - fewest)
            if cost != Cost():
                raise ValueError("a regular expression repeats what may match in several ways")
            return Cost(ways=most - fewest + 1)
    return Cost()


def _may_fail(node: _Node) -> bool:
    match node:
        case _Sequence(parts):
            return any(map(_may_fail, parts))
        case _Choice(branches):
            return all(map(_may_fail, branches))
        case _Repeat(body, fewest, _):
            return fewest > 0 and _may_fail(body)
    return True


class _Parser:
    """Reads a regular expression from left to right. Whatever it does not know is refused."""

    def __init__(self, regex: str) -> None:
        self._regex = regex
        self._at = 0
        self._depth = 0

    def whole(self) -> _Node:
        node = self._choice()
        if self._at < len(self._regex):
            raise self._unknown()
        return node

    def _choice(self) -> _Node:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ValueError("a regular expression is nested too deeply")
        branches = [self._sequence()]
        while self._takes("|"):
            branches.append(self._sequence())
        self._depth -= 1
        return branches[0] if len(branches) == 1 else _Choice(tuple(branches))

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._at < len(self._regex) and self._regex[self._at] not in "|)":
            parts.append(self._repeated(self._one()))
        return _Sequence(tuple(parts))

    def _repeated(self, body: _Node) -> _Node:
        found = None
        if self._takes("?"):
            bounds: tuple[int, int | None] = (0, 1)
        elif self._takes("*"):
            bounds = (0, None)
        elif self._takes("+"):
            bounds = (1, None)
        elif found := self._matches(_BOUNDS):
            bounds = self._bounds(*found.groups())
        else:
            return body
        # After a star, a plus or a question mark these two change how it repeats; after bounds they repeat it again.
        if not found and not self._takes("+"):
            self._takes("?")
        if self._at < len(self._regex) and self._regex[self._at] in "?*+{":
            raise self._unknown()
        return _Repeat(body, *bounds)

    def _bounds(self, first: str, comma: str, second: str) -> tuple[int, int | None]:
        if not first and not second:
            raise self._unknown()
        fewest = int(first or 0)
        most = fewest if not comma else int(second) if second else None
        if max(fewest, most or 0) > _MAX_REPEATS or (most is not None and not fewest <= most != 0):
            raise ValueError(f"a regular expression repeats something {{{first}{comma}{second}}} times")
        return fewest, most

    def _one(self) -> _Node:
        if found := self._matches(_OPENING):
            body = self._choice()
            if not self._takes(")"):
                raise self._unknown()
            return _Look(body) if found[0][2:] in ("=", "!", "<=", "<!") else body
        if self._takes("["):
            return self._class()
        begin = self._at
        if self._takes_escape():
            return _Atom(is_space=self._regex[begin : self._at] == "\\s")
        if self._regex[self._at] in "?*+{})]":
            raise self._unknown()
        self._at += 1
        return _Atom()

    def _class(self) -> _Node:
        """A set of characters. One inside another, and what both share, are not known here."""
        self._takes("^")
        begin = self._at
        while not self._takes("]"):
            if self._takes_escape():
                continue
            if self._at >= len(self._regex) or self._regex[self._at] == "[" or self._regex.startswith("&&", self._at):
                raise self._unknown()
            self._at += 1
        if self._at == begin + 1:
            raise self._unknown()
        return _Atom()

    def _takes_escape(self) -> bool:
        if not self._regex.startswith("\\", self._at):
            return False
        if self._matches(_ESCAPE):
            return True
        escaped = self._regex[self._at + 1 : self._at + 2]
        if not escaped or (escaped.isalnum() and escaped not in _PLAIN_LETTERS):
            raise self._unknown()
        self._at += 2
        return True

    def _takes(self, character: str) -> bool:
        if not self._regex.startswith(character, self._at):
            return False
        self._at += len(character)
        return True

    def _matches(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        if found := pattern.match(self._regex, self._at):
            self._at = found.end()
        return found

    def _unknown(self) -> ValueError:
        return ValueError(f"the regular expression {self._regex!r:.80} is not understood at character {self._at}")
