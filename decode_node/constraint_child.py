"""Tries a constraint out as a process of its own, which the system ends when it takes too much.

A schema or a regular expression is a program that a stranger wrote, and the library that compiles it is in this process
alone with it: whatever happens to it here happens to no answer. Reads one JSON object from stdin and writes one to
stdout. It is run by its path and imports nothing of the project.
"""

import json
import resource
import sys
from itertools import count

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

_NUM_STEPS = 100


class _Bytes:
    """A vocabulary of all bytes and an end."""

    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def main() -> None:
    """Compile, and write the beginnings of two answers: much of what a grammar costs shows in its first steps."""
    task = json.load(sys.stdin)
    cpu_s, memory_bytes = task["cpu_s"], task["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()), eos_token=_Bytes.eos_token_id, slices=[])
    matcher = LLMatcher(tokenizer, task["grammar"], log_level=0, limits=LLParserLimits(**task["limits"]))
    refused = "" if matcher.is_error() or _allowed(matcher) else "allows no answer but an empty one"
    for stride in (1, 7):
        _write(matcher, stride)
        if matcher.is_error():
            refused = " ".join(matcher.get_error().partition("<")[0].split())
            break
        matcher.reset()
    json.dump({"refused": refused}, sys.stdout)


def _write(matcher: LLMatcher, stride: int) -> None:
    """Take one of the allowed bytes after the other, by turns of all kinds."""
    for place in count(0, stride):
        if place >= _NUM_STEPS * stride or matcher.is_error() or not (allowed := _allowed(matcher)):
            return
        matcher.consume_token(allowed[place % len(allowed)])


def _allowed(matcher: LLMatcher) -> list[int]:
    mask = matcher.compute_bitmask()
    return [byte for byte in range(256) if mask[byte // 8] >> byte % 8 & 1]


if __name__ == "__main__":
    main()
