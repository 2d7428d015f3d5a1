"""What a regular expression may cost: published ones pass, those that try every way to match do not."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colm.convert.gguf_tokenizer import LLAMA3_WORDS
from colm.text.regex_cost import cost_of
from tests.encoders import BACKTRACKING, DIGITS_FROM_THE_RIGHT

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LINEAR = {
    "LLaMA 3": LLAMA3_WORDS,
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "GPT-4": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "DeepSeek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "letters": "[\u4e00-\u9fa5\u3040-\u309f]+",
    "two spaces": " {2,}",
}
QUADRATIC = {
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{Lm}]+"
    + CONTRACTIONS
    + r"?|\p{N}{1,3}|\s*[\r\n]+|\s+(?!\S)|\s+",
    "digits from the right": DIGITS_FROM_THE_RIGHT,
    "thousands": r"(?<=\d)(?=(\d{3})+(?!\d))",
    "spaces that nothing takes": r"\s+x",
    "spaces twice": r"\s*\s+x|\s+",
    "giving nothing back": "a++b",
}
HOSTILE = {
    "a repeat in a repeat": BACKTRACKING,
    "the same twice": "(a|a)*b",
    "two ways in a repeat": "(?:a|aa)+$",
    "three runs": "a*a*b",
    "a run before a run": "(?=a+)a+b",
    "looking ahead in a repeat": "(?:(?=a+)a)*",
    "many choices": "a?" * 30 + "a" * 30,
    "choices of choices": "(a|b|ab)" * 6,
    "a repeat of bounds": "a{1,64}{1,64}",
    "bounds that a plus repeats": "a{1,3}+",
    "a large bound": "a{999}",
    "a backward reference": r"(a)\1+",
    "a name": r"\k<a>",
    "recursion": "(?R)",
    "a call": r"\g<0>",
    "a comment": "(?#a)",
    "a class in a class": "[[a](b+)+]",
    "what two classes share": "[a&&b]",
    "open": "(",
    "nothing to escape": "\\",
    "deep": "(" * 40 + ")" * 40,
    "long": "a" * 5000,
}


@pytest.mark.parametrize("regex", LINEAR.values(), ids=LINEAR.keys())
def test_published_ones_take_time_for_the_length_of_a_text(regex: str) -> None:
    assert cost_of(regex).degree == 0


@pytest.mark.parametrize("regex", QUADRATIC.values(), ids=QUADRATIC.keys())
def test_some_take_time_for_the_square_of_it(regex: str) -> None:
    assert cost_of(regex).degree == 1


@pytest.mark.parametrize("regex", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_may_take_longer_or_is_not_understood_is_refused(regex: str) -> None:
    """Bug: the gateway ran whatever a model's maker had written, on its own threads."""
    with pytest.raises(ValueError, match="regular expression"):
        cost_of(regex)


LEAVES = {"a": "a", "b": "b", r"\s": " "}
REPEATS = {"?": (0, 1), "*": (0, 999), "+": (1, 999), "{1,2}": (1, 2)}


def nodes() -> st.SearchStrategy[Any]:
    """Small expressions, as trees."""
    leaf = st.sampled_from([("leaf", written) for written in LEAVES])
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.tuples(st.just("sequence"), st.lists(inner, min_size=1, max_size=3)),
            st.tuples(st.just("choice"), st.lists(inner, min_size=1, max_size=3)),
            st.tuples(st.sampled_from(list(REPEATS)), inner),
            st.tuples(st.just("ahead"), inner),
        ),
        max_leaves=6,
    )


def written(node: Any) -> str:
    kind, body = node
    match kind:
        case "leaf":
            return str(body)
        case "sequence":
            return "".join(map(written, body))
        case "choice":
            return f"(?:{'|'.join(map(written, body))})"
        case "ahead":
            return f"(?={written(body)})"
    return f"(?:{written(body)}){kind}"


class Steps:
    """A matcher that tries every way, one after the other, and counts the characters that it looks at."""

    def __init__(self, text: str, most: int) -> None:
        self.text, self.left = text, most

    def ends(self, node: Any, at: int) -> Iterator[int]:
        kind, body = node
        match kind:
            case "leaf":
                self.left -= 1
                assert self.left > 0, "it takes longer than was said"
                if self.text[at : at + 1] == LEAVES[body]:
                    yield at + 1
            case "sequence":
                if not body:
                    yield at
                    return
                for end in self.ends(body[0], at):
                    yield from self.ends((kind, body[1:]), end)
            case "choice":
                for branch in body:
                    yield from self.ends(branch, at)
            case "ahead":
                if next(self.ends(body, at), None) is not None:
                    yield at
            case _:
                yield from self._repeated(body, *REPEATS[kind], at)

    def _repeated(self, body: Any, fewest: int, most: int, at: int) -> Iterator[int]:
        if most:
            for end in self.ends(body, at):
                if end > at:
                    yield from self._repeated(body, max(0, fewest - 1), most - 1, end)
        if not fewest:
            yield at

    def search(self, node: Any) -> None:
        at = 0
        while at < len(self.text):
            end = next(self.ends(node, at), at)
            at = max(end, at + 1)


@settings(max_examples=150)
@given(nodes(), st.lists(st.sampled_from(["a", "b", " ", "a" * 100, " " * 100]), max_size=3))
def test_a_search_takes_no_longer_than_was_said(node: Any, parts: list[str]) -> None:
    regex, text = written(("choice", [node, ("+", ("leaf", r"\s"))]))[3:-1], "".join(parts)
    try:
        cost = cost_of(regex)
    except ValueError:
        return
    allowed = len(regex) * cost.ways * (len(text) + 1) ** (cost.degree + 1)
    Steps(text, allowed).search(("choice", [node, ("+", ("leaf", r"\s"))]))
