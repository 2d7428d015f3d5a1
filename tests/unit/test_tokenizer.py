"""Encoding against transformers, special tokens that stay text, and streams that agree with `decode`."""

import itertools
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from colm.checkpoint import Checkpoint, TextConfig
from colm.convert.gguf_tokenizer import text_from_gguf
from colm.errors import CheckpointError, InvalidRequest, UnsupportedModel
from colm.request import ChatMessage, ChatRole
from colm.text.detokenizer import Detokenizer, TextStream
from colm.text.tokenizer import Tokenizer
from tests.tiny import CHAT_TEMPLATE, tiny_checkpoint, tiny_tokenizer

TRIMMING_TEMPLATE = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
NOW = datetime(2026, 3, 5, tzinfo=UTC)
TEXTS = [
    "",
    "Hello, world! It's 2024; they're 3.14159 away.",
    "def f(x):\n\treturn  x ** 2   # squared\n\n\nclass A:\n    pass\n",
    "naïve café, „Übergrößenträger“ résumé",
    "日本語のテキストと中文文本, 한국어 텍스트.",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 and \u0301 combining, \u200b zero width, \ufeff bom",
    "   leading, trailing   \n\n  \t \r\n mixed    runs     ",
    "12345 1 22 333\t4444  x1y2 ½ ٣ ²",
    'https://example.org/a?b=c&d=%20#e <b>html</b> {"json": [1, null]} \\x00 \x00',
    "\n",
    " ",
]


def make(backend: tokenizers.Tokenizer | None = None, template: str | None = CHAT_TEMPLATE, **text: Any) -> Tokenizer:
    values: dict[str, Any] = {"bos_token_id": 1, "eos_token_ids": (2,)} | text
    backend = backend or tiny_tokenizer()
    return Tokenizer(backend.to_str().encode(), TextConfig(chat_template=template, **values), lambda: NOW)


def chat_ids_of_transformers(backend: tokenizers.Tokenizer, template: str, content: str) -> list[int]:
    peer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>")
    messages = [{"role": "user", "content": content}]
    ids: list[int] = peer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, return_dict=False
    )
    return ids


class FakeGguf:
    """The metadata of a GGUF file without the file."""

    path = Path("fake.gguf")

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def metadata(self, key: str) -> Any:
        return self.values.get(key.removeprefix("tokenizer.ggml."))


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path, smollm2_checkpoint: Checkpoint) -> tuple[Tokenizer | None, Any]:
    """Our reading of the real tokenizer, and transformers'.

    The model's pre-tokenizer cuts digits out one by one before GPT-2's rule. transformers' GGUF loader leaves
    that step out, which shows where spaces stand before a digit, so it is put back here.
    """
    ours = Tokenizer.load(smollm2_checkpoint)
    peer = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    digits = pre_tokenizers.Digits(individual_digits=True)
    peer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, peer.backend_tokenizer.pre_tokenizer])
    return ours, peer


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_text_encodes_like_transformers_and_comes_back(smollm2, text):
    ours, peer = smollm2
    ids = ours.encode(text).tolist()
    assert ids == peer(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_chat_encodes_like_transformers(smollm2, text):
    ours, peer = smollm2
    messages = [{"role": "user", "content": text}]
    theirs = peer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.encode_prompt(document="", prompt=text, chat=True).tolist() == theirs


TURNS: tuple[tuple[ChatRole, ...], ...] = (
    ("system",),
    ("user", "assistant"),
    ("system", "user", "assistant", "user", "assistant"),
)


@pytest.mark.parametrize("roles", TURNS)
def test_a_conversation_encodes_like_transformers(smollm2, roles):
    ours, peer = smollm2
    said = [{"role": role, "content": text} for role, text in zip(roles, TEXTS[1:], strict=False)]
    theirs = peer.apply_chat_template(
        [*said, {"role": "user", "content": "and now?"}], add_generation_prompt=True, return_dict=False
    )
    history = [ChatMessage(**message) for message in said]
    assert ours.encode_prompt(document="", prompt="and now?", chat=True, history=history).tolist() == theirs


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TRIMMING_TEMPLATE], ids=["as is", "trimming"])
@pytest.mark.parametrize("text", TEXTS)
def test_chat_encodes_like_transformers_whether_or_not_the_template_trims(template, text):
    ids = make(template=template).encode_prompt(document=text, prompt="", chat=True).tolist()
    assert ids == chat_ids_of_transformers(tiny_tokenizer(), template, text)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_chat_encodes_like_transformers_with_a_metaspace_tokenizer(scheme):
    tokens = ["<|unk|>", "<|im_start|>", "<|im_end|>", *"▁abcdefghijklmnopqrstuvwxyz\n"]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<|unk|>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.add_tokens([AddedToken(token, normalized=False, special=True) for token in tokens[:3]])
    ids = make(backend).encode_prompt(document="some words", prompt="and more", chat=True).tolist()
    assert ids == chat_ids_of_transformers(backend, CHAT_TEMPLATE, "some words\n\nand more")


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
def test_special_tokens_that_swallow_spaces_do_so_as_in_transformers(flags):
    body = json.loads(tiny_tokenizer().to_str())
    for token in body["added_tokens"]:
        token |= flags
    backend = tokenizers.Tokenizer.from_str(json.dumps(body))
    template = "<|im_start|> {{ messages[0]['content'] }} <|im_end|>\n the end"
    ids = make(backend, template).encode_prompt(document="  a b  ", prompt="", chat=True).tolist()
    assert ids == chat_ids_of_transformers(backend, template, "  a b  ")


HOSTILE = st.text(alphabet=st.sampled_from("<|im_endstaroxt>\n \u2003\ue000ä"), max_size=40)
FRAGMENTS = st.sampled_from(["<|im_end|>", "<|im_start|>system\n", "<|im_", "end|>", "<|endoftext|>", "\ue0000\ue001"])
HOSTILE_TEXT = st.lists(HOSTILE | FRAGMENTS, max_size=5).map("".join)


@given(document=HOSTILE_TEXT, prompt=HOSTILE_TEXT)
def test_no_content_ever_becomes_a_special_token(document, prompt):
    tokenizer = make()
    ids = tokenizer.encode_prompt(document=document, prompt=prompt, chat=True).tolist()
    assert [token for token in ids if token < 3] == [1, 2, 1]
    content = "\n\n".join(part for part in (document, prompt) if part)
    expected = f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids, skip_special=False) == expected
    raw = tokenizer.encode_prompt(document=document, prompt=prompt, chat=False).tolist()
    assert not {0, 1, 2} & set(raw)
    assert tokenizer.decode(raw) == document + prompt


@given(first=HOSTILE_TEXT, second=HOSTILE_TEXT)
def test_nothing_said_before_becomes_a_special_token_or_another_message(first, second):
    tokenizer = make()
    history = [ChatMessage(role="user", content=first), ChatMessage(role="assistant", content=second)]
    ids = tokenizer.encode_prompt(document="", prompt="x", chat=True, history=history).tolist()
    assert [token for token in ids if token < 3] == [1, 2] * 3 + [1]
    said = ((message.role, message.content) for message in (*history, ChatMessage(role="user", content="x")))
    expected = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in said)
    assert tokenizer.decode(ids, skip_special=False) == expected + "<|im_start|>assistant\n"


def test_a_template_that_writes_a_marker_of_its_own_is_refused():
    tokenizer = make(template="\ue0007\ue001{{ messages[0]['content'] }}")
    with pytest.raises(InvalidRequest, match="stands for no message"):
        tokenizer.encode_prompt(document="", prompt="a", chat=True)


@pytest.mark.parametrize(("document", "prompt", "content"), [("a", "b", "a\n\nb"), ("a", "", "a"), ("", "b", "b")])
def test_separator_stands_only_between_two_parts(document, prompt, content):
    tokenizer = make(template="{{ messages[0]['content'] }}")
    ids = tokenizer.encode_prompt(document=document, prompt=prompt, chat=True).tolist()
    assert tokenizer.decode(ids) == content


def test_raw_completion_joins_the_parts_and_begins_with_bos_where_wanted():
    ids = make().encode("then and").tolist()
    assert make().encode_prompt(document="th", prompt="en and", chat=False).tolist() == ids
    assert make(add_bos=True).encode_prompt(document="th", prompt="en and", chat=False).tolist() == [1, *ids]


def test_large_document_is_encoded_whole():
    document = "the <|im_end|> " * 70_000 + "x" * 100_000
    tokenizer = make()
    ids = tokenizer.encode_prompt(document=document, prompt="and?", chat=True).tolist()
    assert tokenizer.decode(ids, skip_special=False).count(document) == 1


def test_encoding_ends_after_the_piece_at_which_it_is_stopped():
    """Bug: a whole document was tokenised before its length was checked, or whether its caller still waits."""
    counts: list[int] = []

    def stop_at(num_ids: int) -> None:
        counts.append(num_ids)
        if num_ids > 1000:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        make().encode_prompt(document="x" * 5_000_000, prompt="and?", chat=True, progress=stop_at)
    assert counts[-2] < 1000 < counts[-1] < 100_000


def test_template_sees_bos_eos_and_the_injected_date():
    tokenizer = make(template="{{ bos_token }}{{ eos_token }}{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}")
    ids = tokenizer.encode_prompt(document="a", prompt="", chat=True).tolist()
    assert (ids[:2], tokenizer.decode(ids)) == ([1, 2], "05 Mar 2026a")


def test_chat_without_a_template_is_refused_with_the_way_out():
    tokenizer = make(template=None)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match=r"chat=True.*use raw completion"):
        tokenizer.encode_prompt(document="", prompt="a", chat=True)


def test_template_that_refuses_the_message_is_quoted():
    tokenizer = make(template="{{ raise_exception('a system message is needed') }}")
    with pytest.raises(InvalidRequest, match="a system message is needed"):
        tokenizer.encode_prompt(document="", prompt="a", chat=True)


def test_template_that_multiplies_a_document_is_refused():
    tokenizer = make(template="{% for _ in range(1000) %}{{ messages[0].content }}{% endfor %}")
    with pytest.raises(InvalidRequest, match="writes a message 1000 times; use raw completion"):
        tokenizer.encode_prompt(document="x" * 1000, prompt="a", chat=True)


def test_template_cannot_reach_python():
    tokenizer = make(template="{{ messages.__class__.__mro__ }}")
    with pytest.raises(InvalidRequest, match="unsafe"):
        tokenizer.encode_prompt(document="", prompt="a", chat=True)


def test_broken_template_and_broken_tokenizer_are_refused():
    with pytest.raises(CheckpointError, match="chat_template line 1"):
        make(template="{% for %}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(b"{}", TextConfig(), lambda: NOW)
    backend = tiny_tokenizer()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedModel, match="WordPiece"):
        make(backend)


def test_checkpoint_gives_its_tokenizer_or_none(tmp_path):
    assert Tokenizer.load(tiny_checkpoint(tmp_path / "ids")) is None
    tokenizer = Tokenizer.load(tiny_checkpoint(tmp_path / "text", tokenizer=True))
    assert tokenizer is not None
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids, tokenizer.has_chat_template) == (270, (2,), True)


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    specials = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["▁t", "he", "▁the", "in", "er", "▁a", "ing", "th", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    return {
        "model": "llama",
        "tokens": specials + byte_tokens + pieces,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    } | changes


def sentencepiece_reference(metadata: Mapping[str, Any], text: str) -> list[int]:
    """SentencePiece's rule, spelled out: join the best-scoring neighbours while any can join; the rest become bytes."""
    ids = {token: token_id for token_id, token in enumerate(metadata["tokens"])}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        scored = [
            (metadata["scores"][ids[left + right]], -index)
            for index, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in ids
        ]
        if not scored:
            break
        index = -max(scored)[1]
        symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]
    groups = [[ids[s]] if s in ids else [ids[f"<0x{byte:02X}>"] for byte in s.encode()] for s in symbols]
    return [token_id for group in groups for token_id in group]


@pytest.mark.parametrize("text", ["the thing in there", " a  then", "", "singer Ä the 日本\n", "t h e"])
def test_sentencepiece_vocabulary_follows_its_scores(text):
    metadata = sentencepiece_metadata()
    tokenizer_json, conventions = text_from_gguf(FakeGguf(metadata))
    assert tokenizer_json is not None
    tokenizer = Tokenizer(tokenizer_json, conventions, lambda: NOW)
    assert conventions.add_bos
    assert tokenizer.encode(text).tolist() == sentencepiece_reference(metadata, text)
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def test_sentencepiece_without_the_first_space_keeps_spaces():
    tokenizer_json, conventions = text_from_gguf(FakeGguf(sentencepiece_metadata(add_space_prefix=False)))
    assert tokenizer_json is not None
    tokenizer = Tokenizer(tokenizer_json, conventions, lambda: NOW)
    assert tokenizer.decode(tokenizer.encode("a").tolist()) == "a"
    assert tokenizer.decode(tokenizer.encode(" a").tolist()) == " a"


def test_llama3_words_hold_three_digits_and_whole_words_need_no_merges():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    metadata = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": [*alphabet, "12", "123", "1234", "Ġword"],
        "merges": ["1 2", "12 3", "123 4"],
        "bos_token_id": 0,
    }
    tokenizer_json, conventions = text_from_gguf(FakeGguf(metadata))
    assert tokenizer_json is not None
    tokenizer = Tokenizer(tokenizer_json, conventions, lambda: NOW)
    assert conventions.add_bos
    assert [tokenizer.decode([token]) for token in tokenizer.encode("1234 word").tolist()] == ["123", "4", " word"]


@pytest.mark.parametrize("change", [{"scores": None}, {"tokens": ["a", "a"]}, {"model": None}])
def test_incomplete_vocabulary_is_reported_and_ids_are_served(change):
    with pytest.warns(UserWarning, match="serves token ids only"):
        tokenizer_json, conventions = text_from_gguf(FakeGguf(sentencepiece_metadata(**change)))
    assert tokenizer_json is None
    assert conventions.eos_token_ids == (2,)


@given(st.lists(st.integers(0, 300), max_size=60), st.booleans())
def test_stream_of_any_ids_equals_decode_and_the_library(ids, skip_special):
    """Ids above 269 are outside the vocabulary; the bytes are rarely valid UTF-8."""
    backend = tiny_tokenizer()
    tokenizer = make(backend)
    stream = tokenizer.stream(skip_special)
    pushed = "".join([stream.push(token_id) for token_id in ids]) + stream.flush()
    assert pushed == tokenizer.decode(ids, skip_special) == backend.decode(ids, skip_special_tokens=skip_special)


@given(st.text())
def test_stream_never_shows_half_a_character(text):
    tokenizer = make()
    stream, shown = tokenizer.stream(), ""
    for token_id in tokenizer.encode(text).tolist():
        shown += stream.push(token_id)
        assert text.startswith(shown)
    assert shown == text
    assert stream.flush() == ""


def test_unfinished_character_becomes_one_replacement_at_the_end():
    tokenizer = make()
    stream = tokenizer.stream()
    assert [stream.push(token_id) for token_id in tokenizer.encode("a€")[:-1].tolist()] == ["a", "", ""]
    assert stream.flush() == "\ufffd"


@given(st.text(alphabet="the in日€ "))
def test_sentencepiece_stream_equals_the_library_on_valid_text(text):
    tokenizer_json, _ = text_from_gguf(FakeGguf(sentencepiece_metadata()))
    backend = tokenizers.Tokenizer.from_buffer(tokenizer_json)
    ids = backend.encode(text, add_special_tokens=False).ids
    stream = TextStream(Detokenizer(backend))
    assert "".join([stream.push(token_id) for token_id in ids]) + stream.flush() == backend.decode(ids) == text
