"""Grammars for the tiny tokenizer, compiled without the child process that tries a stranger's out."""

from functools import cache

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from colm.sampling import Constraint
from colm.text.detokenizer import Detokenizer
from decode_node.constraint import Grammar
from decode_node.grammar import _LIMITS, _grammar
from tests.tiny import tiny_tokenizer

EOS = 2
TOKENIZER = tiny_tokenizer()
VOCAB_SIZE = 320
"""Of tiny models, whose table has more rows than the tokenizer has tokens."""


class _Vocabulary:
    eos_token_id = VOCAB_SIZE
    bos_token_id = None
    special_token_ids = (VOCAB_SIZE,)

    def __init__(self) -> None:
        detokenizer = Detokenizer(TOKENIZER)
        self.tokens = [*(detokenizer.token_bytes(token_id) for token_id in range(VOCAB_SIZE)), b"<end>"]

    def __call__(self, text: bytes) -> list[int]:
        ids: list[int] = TOKENIZER.encode(text.decode()).ids
        return ids


@cache
def _vocabulary() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Vocabulary()), eos_token=VOCAB_SIZE)


@cache
def grammar_of(constraint: Constraint) -> Grammar:
    matcher = LLMatcher(_vocabulary(), _grammar(constraint), log_level=0, limits=LLParserLimits(**_LIMITS))
    assert not matcher.is_error(), matcher.get_error()
    return Grammar(matcher, constraint, VOCAB_SIZE)
