"""Compiles what constrains answers, a JSON schema or a regular expression, for a model's vocabulary.

llguidance does it (https://github.com/guidance-ai/llguidance). A stranger's schema is tried out by a child process
first, with limits on time and memory, and runs under the library's own limits afterwards.
"""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from colm.child import TookTooMuch, ask_child
from colm.errors import InvalidRequest
from colm.sampling import Constraint
from colm.text.tokenizer import Tokenizer
from decode_node.constraint import ConstrainedText, Grammar

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from llguidance._lib import JsonCompileOptions

_CHILD = Path(__file__).with_name("constraint_child.py")
_CPU_S = 2
"""Its start included, which takes 0.1 s."""
_MEMORY_BYTES = 512 << 20
_MAX_AT_ONCE = 2
MAX_KEPT = 16
"""Grammars kept: of 10,000 lexer states, each has at most 20 MB."""
_LIMITS: Final[dict[str, Any]] = {
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 100_000,  # 14,000 take a ms, as llguidance says
    "step_max_items": 20_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,  # which would show the answer in logs
}
_JSON_OPTIONS: Final["JsonCompileOptions"] = {
    # What it cannot hold an answer to, it must not pass over.
    "lenient": False,
    "coerce_one_of": False,
    # Models may write space between any two parts, and small ones would go on for ever.
    "whitespace_flexible": True,
    "whitespace_pattern": r"[ \t\r\n]{0,20}",
}


class Grammars:
    """Compiles constraints for one vocabulary, and keeps the last of them. It belongs to the event loop.

    Args:
        tokenizer: None for a model that serves token ids, whose answers have no text to constrain.
        vocab_size: rows of the model's table.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._kept: OrderedDict[Constraint, Grammar] = OrderedDict()
        self._room = asyncio.Semaphore(_MAX_AT_ONCE)

    async def begin(self, constraint: Constraint | None) -> ConstrainedText | None:
        """What an answer may say, from its beginning; None where there is no constraint.

        Raises:
            InvalidRequest: names the field; it cannot be compiled, or takes too much.
        """
        if constraint is None:
            return None
        if self._tokenizer is None:
            raise InvalidRequest(
                constraint.kind, constraint.text, "the model has no tokenizer, so answers have no text"
            )
        async with self._room:
            if (grammar := self._kept.get(constraint)) is None or grammar.is_worn:
                grammar = self._kept[constraint] = await asyncio.to_thread(self._compile, constraint)
            self._kept.move_to_end(constraint)
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return ConstrainedText(grammar)

    def _compile(self, constraint: Constraint) -> Grammar:
        # Here, and below: most nodes never need it.
        from llguidance import LLMatcher, LLParserLimits

        grammar = _grammar(constraint)
        if refused := _tried_out(grammar):
            raise InvalidRequest(constraint.kind, constraint.text, refused)
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
        if matcher.is_error():
            raise InvalidRequest(constraint.kind, constraint.text, matcher.get_error())
        return Grammar(matcher, constraint, self._vocab_size)

    @cached_property
    def _vocabulary(self) -> "LLTokenizer":
        from llguidance import LLTokenizer, TokenizerWrapper

        assert self._tokenizer is not None
        vocabulary = _Vocabulary(self._tokenizer, self._vocab_size)
        made = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=self._vocab_size)
        vocabulary.fallback = made
        return made


class _Vocabulary:
    """A model's tokens as llguidance asks for them: the bytes that each adds to an answer's text, then one for its end.

    Special tokens add none, so none of them is ever a part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = vocab_size
        self.bos_token_id = None
        self.special_token_ids = [vocab_size]
        self.tokens = [*tokenizer.answer_bytes(range(vocab_size)), b"<end>"]
        self.fallback: LLTokenizer | None = None

    def __call__(self, text: bytes) -> Sequence[int]:
        """Tokens of bytes that are forced: the model's own, where they are these bytes exactly."""
        ids: list[int] = self._tokenizer.encode(text.decode(errors="replace")).tolist()
        if b"".join(self.tokens[token_id] for token_id in ids) == text or self.fallback is None:
            return ids
        return self.fallback.greedy_tokenize(text.decode(errors="replace"))


def _grammar(constraint: Constraint) -> str:
    from llguidance import LLMatcher

    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.text)
    return LLMatcher.grammar_from_json_schema(constraint.text, overrides=_JSON_OPTIONS)


def _tried_out(grammar: str) -> str:
    """Why a grammar cannot be served; empty where it can."""
    task = {"grammar": grammar, "limits": _LIMITS, "cpu_s": _CPU_S, "memory_bytes": _MEMORY_BYTES}
    try:
        return str(ask_child([str(_CHILD)], json.dumps(task).encode())["refused"])
    except TookTooMuch:
        return f"takes more than {_CPU_S} s of CPU time or {_MEMORY_BYTES >> 20} MiB to compile; make it simpler"
