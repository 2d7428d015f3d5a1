"""Tokenizers made to hang the gateway or fill it: refused as they are loaded, with the field named."""

import base64
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from colm.checkpoint import TextConfig
from colm.errors import CheckpointError
from colm.text import tokenizer_file
from colm.text.pieces import SHORT_WINDOW_CHARS
from colm.text.tokenizer import Tokenizer
from colm.text.tokenizer_file import parse_tokenizer
from tests.encoders import DIGITS_FROM_THE_RIGHT, FAMILIES, with_words
from tests.fuzz.large import TOKENIZERS
from tests.tiny import tiny_tokenizer


def changed(**parts: Any) -> bytes:
    return json.dumps(json.loads(tiny_tokenizer().to_str()) | parts).encode()


def model(**parts: Any) -> bytes:
    return changed(model=json.loads(tiny_tokenizer().to_str())["model"] | parts)


def step(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind} | fields


def split(regex: str) -> bytes:
    return changed(pre_tokenizer=step("Split", pattern={"Regex": regex}, behavior="Isolated", invert=False))


def charsmap(texts: bytes) -> dict[str, Any]:
    table = bytes(64)
    written = base64.b64encode(len(table).to_bytes(4, "little") + table + texts).decode()
    return step("Precompiled", precompiled_charsmap=written)


REPLACE = step("Replace", pattern={"String": "t"}, content="tt")
HOSTILE = {
    "backtracking": (split("(a+)+b"), "pre_tokenizer.pattern.Regex"),
    "backtracking of a normalizer": (
        changed(normalizer=step("Replace", pattern={"Regex": "a*a*b"}, content="")),
        "normalizer.pattern.Regex",
    ),
    "backtracking of a decoder": (
        changed(decoder=step("Replace", pattern={"Regex": "a{1,9999}"}, content="")),
        "decoder.pattern.Regex",
    ),
    "doubling": (changed(normalizer=step("Sequence", normalizers=[REPLACE] * 16)), "may make 131072 bytes of one"),
    "a long text for a short one": (changed(normalizer=REPLACE | {"content": "x" * 65}), "normalizer.content"),
    "a long prefix": (changed(normalizer=step("Prepend", prepend="x" * 30)), "may make 62 bytes of one"),
    "many steps": (changed(normalizer=step("Sequence", normalizers=[step("NFC")] * 17)), "normalizer.normalizers"),
    "Unicode again and again": (
        changed(normalizer=step("Sequence", normalizers=[step("NFKC")] * 3)),
        "with 3 Unicode forms",
    ),
    "a text that a character stands for": (changed(normalizer=charsmap(b"x" * 99 + b"\0")), "precompiled_charsmap"),
    "a table without texts": (changed(normalizer=charsmap(b"")), "precompiled_charsmap"),
    "a kind that is not known": (changed(normalizer=step("Exec")), "normalizer.type='Exec'"),
    "a template that repeats": (
        changed(
            post_processor=step("TemplateProcessing", single=[{"Sequence": {"id": "A", "type_id": 0}}] * 99, pair=[])
        ),
        "post_processor.single",
    ),
    "words one by one": (model(type="WordPiece"), "model.type='WordPiece'"),
    "chance": (model(dropout=0.5), "model.dropout=0.5"),
    "no vocabulary": (model(vocab=[]), "model.vocab is list, not dict"),
    "a negative id": (model(vocab={"a": -1}), "model.vocab"),
    "a long token": (model(vocab={"a" * 1025: 0}), "model.vocab has a token of more than 1024"),
    "merges that are none": (model(merges={"a": 1}), "model.merges is dict"),
    "a long added token": (
        changed(added_tokens=[{"id": 0, "content": "a" * 1025, "special": False}]),
        "added_tokens.0.content",
    ),
    "a field twice": (b'{"normalizer": null, ' + changed()[1:], "a field or a token twice"),
    "not UTF-8": (b'"\xff"', "utf-8"),
    "no object": (b"[]", "holds list"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    **{
        name: (b"".join(TOKENIZERS[name]()), "tokenizer.json cannot be read")
        for name in ("objects, 2 MiB", "fields, 2 MiB")
    },
}


@pytest.mark.parametrize(("tokenizer_json", "said"), HOSTILE.values(), ids=HOSTILE.keys())
def test_what_could_hang_or_fill_the_gateway_is_refused_before_the_library_sees_it(
    tokenizer_json: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a tokenizer was loaded, and ran, without any bound."""
    monkeypatch.setattr(tokenizer_file.tokenizers, "Tokenizer", None)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read") as refused:
        parse_tokenizer(tokenizer_json)
    assert said in str(refused.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(family: str) -> None:
    _, is_linear = parse_tokenizer(FAMILIES[family].to_str().encode())
    assert is_linear is (family != "digits from the right")


def test_a_check_that_takes_too_much_ends_its_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_file, "_LARGE_BYTES", 0)
    # So long that no room is left over for it in the memory that the child has before its limit.
    padded = tiny_tokenizer().to_str().encode() + b" " * (16 << 20)
    parse_tokenizer(padded)
    monkeypatch.setattr(tokenizer_file, "_MEMORY_BYTES", 1 << 20)
    with pytest.raises(CheckpointError, match="CPU time or"):
        parse_tokenizer(padded)


def test_windows_are_short_and_stay_short_where_time_grows_with_their_square() -> None:
    """Bug: a window of a million characters took minutes, and nothing looked whether its caller still waits."""
    text = TextConfig()
    slow = Tokenizer(
        with_words(DIGITS_FROM_THE_RIGHT).to_str().encode(), text, lambda: datetime(2026, 1, 1, tzinfo=UTC)
    )
    fast = Tokenizer(tiny_tokenizer().to_str().encode(), text, lambda: datetime(2026, 1, 1, tzinfo=UTC))
    document = "the end 1234567 " * 4000
    assert slow._first_pieces._window_chars == slow._first_pieces._max_window_chars == SHORT_WINDOW_CHARS
    assert fast._first_pieces._window_chars > SHORT_WINDOW_CHARS
    assert slow.decode(slow.encode(document)) == document


def test_a_template_with_twenty_thousand_special_tokens_is_read_in_one_pass() -> None:
    """A character of the template could be held against each of the tokens, for every request."""
    names = [f"<a{number}>" for number in range(20_000)]
    tokens = [AddedToken(name, normalized=False, special=True) for name in names]
    encoder = tiny_tokenizer()
    encoder.add_tokens(tokens)
    text = TextConfig(chat_template="{{ '<a7777>' }}{{ '<a1' * 50000 }}{{ messages[0].content }}<a7>")
    tokenizer = Tokenizer(encoder.to_str().encode(), text, lambda: datetime(2026, 1, 1, tzinfo=UTC))
    ids = tokenizer.encode_prompt(document="the <a7> end", prompt="", chat=True).tolist()
    first, last = (encoder.token_to_id(name) for name in ("<a7777>", "<a7>"))
    assert [token for token in ids if token >= min(first, last)] == [first, last]


@pytest.mark.parametrize("score", ["0", 10**400, True, None], ids=str)
def test_a_score_is_a_number(score: Any) -> None:
    with pytest.raises(CheckpointError, match=r"model\.vocab has a score that is no finite number"):
        parse_tokenizer(model(type="Unigram", vocab=[["a", score]], unk_id=0))


def test_what_a_file_puts_around_a_text_or_cuts_from_it_is_left_out() -> None:
    """Bug: `encode` of a tokenizer that pads to 2^60 ended the process."""
    encoder = tiny_tokenizer()
    encoder.enable_padding(length=1 << 40)
    encoder.enable_truncation(2)
    found, _ = parse_tokenizer(encoder.to_str().encode())
    assert isinstance(found, Library)
    assert len(found.encode("the end and the end").ids) == len(tiny_tokenizer().encode("the end and the end").ids)
