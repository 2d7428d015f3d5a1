"""What a regular expression may cost: published ones pass, those that try every way to match do not."""

import pytest

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
