"""Text into token ids by a checkpoint's own tokenizer, safe against special tokens named in a document."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, Self

import numpy as np
import tokenizers
from numpy.typing import NDArray

from colm.checkpoint import Checkpoint, TextConfig
from colm.errors import CheckpointError, InvalidRequest
from colm.files import MAX_TOKENIZER_BYTES, read_bytes
from colm.request import ChatMessage, ChatRole
from colm.text.bound import TokenBound
from colm.text.chat_template import ChatTemplate
from colm.text.detokenizer import Detokenizer, TextStream
from colm.text.pieces import SHORT_WINDOW_CHARS, PieceEncoder
from colm.text.tokenizer_file import parse_tokenizer, part_of

# What stands for a message's content while the template is rendered, with its number inside. Private-use characters: no
# template writes them.
_MARKER = re.compile("\ue000([0-9]{1,3})\ue001")
# Whitespace to `str.strip`: a template that trims its content removes these, and thereby shows that it trims.
PADDING = "\u2003"
_MAX_COPIES = 4
"""Of a message, which may be large. No known template writes it twice."""
SEPARATOR = "\n\n"
"""Between document and prompt, in a chat."""

Progress = Callable[[int], None]
"""Called after each piece of a text with the number of ids so far; an exception from it ends the encoding."""


class Tokenizer:
    """Encodes prompts and decodes answers. It never changes, so one instance serves any number of threads."""

    def __init__(self, tokenizer_json: bytes, text: TextConfig, now: Callable[[], datetime]) -> None:
        self._text = text
        self._first, is_linear = parse_tokenizer(tokenizer_json)
        self._first_pieces = _content_pieces(self._first, is_linear=is_linear)
        inner = _without_first_space(self._first)
        self._inner_pieces = self._first_pieces if inner is None else _content_pieces(inner, is_linear=is_linear)
        self._detokenizer = Detokenizer(self._first)
        self._template = None if text.chat_template is None else self._chat_template(text.chat_template, now)
        added = self._first.get_added_tokens_decoder()
        self._special = {token.content: token for token in added.values() if token.special}
        self._special_finder = _finder(self._special)

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, *, now: Callable[[], datetime] = lambda: datetime.now().astimezone()
    ) -> Self | None:
        """The checkpoint's tokenizer; None where it has none and serves token ids only.

        Args:
            checkpoint: an opened checkpoint.
            now: what chat templates that write today's date are told.

        Raises:
            CheckpointError: tokenizer.json or the chat template is broken, or the template takes too much.
            UnsupportedModel: the tokenizer is of a kind that cannot be decoded token by token.
        """
        path = checkpoint.tokenizer_path
        if path is None:
            return None
        tokenizer_json = read_bytes(path, MAX_TOKENIZER_BYTES)
        try:
            return cls(tokenizer_json, checkpoint.text, now)
        except CheckpointError as err:
            raise CheckpointError(f"{checkpoint.path}: {err}") from err

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_prompt(chat=True)` is possible."""
        return self._template is not None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Any of these ends an answer."""
        return self._text.eos_token_ids

    @property
    def vocab_size(self) -> int:
        """Tokens known here; the model's table may have more rows."""
        return int(self._first.get_vocab_size(with_added_tokens=True))

    @cached_property
    def bound(self) -> TokenBound | None:
        """The most text that one token can stand for; None if there is no limit."""
        return TokenBound.of(self._first)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Ids of plain content: no bos, and a special token's name in the text is just text."""
        return _collect(self._first_pieces.pieces(text), lambda _: None)

    def encode_prompt(
        self,
        *,
        document: str,
        prompt: str,
        chat: bool,
        history: Sequence[ChatMessage] = (),
        progress: Progress = lambda _: None,
    ) -> NDArray[np.int64]:
        """Ids of a whole request.

        Ordinary text is encoded exactly as transformers' `apply_chat_template` does it (or, without chat, its
        tokenizer). Names of special tokens inside `document` or `prompt` stay text in both forms.

        Args:
            document: what the prompt is about; may be empty.
            prompt: the instruction or the beginning of the completion; may be empty.
            chat: render as a user's message, `document`, a blank line and `prompt`; else a raw completion of
                `document` and `prompt` end to end, after bos where the model wants one.
            history: what was said before that message; with `chat` only.
            progress: may stop at a length, or when nobody waits any more.

        Raises:
            InvalidRequest: `chat` of a model without a chat template, or whose template refuses the message; or
                the tokenizer cannot read the text.
        """
        return _collect(self._prompt_pieces(document, prompt, history, chat=chat), progress)

    def _prompt_pieces(
        self, document: str, prompt: str, history: Sequence[ChatMessage], *, chat: bool
    ) -> Iterator[NDArray[np.int64]]:
        if not chat:
            bos = self._text.bos_token_id
            if self._text.add_bos and bos is not None:
                yield _one(bos)
            yield from self._first_pieces.pieces(document + prompt)
            return
        contents = [message.content for message in history]
        contents.append(SEPARATOR.join(part for part in (document, prompt) if part))
        roles = (*(message.role for message in history), "user")
        yield from self._encode_around(self._render(roles), contents)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids; see `Detokenizer` for invalid bytes."""
        return self._detokenizer.decode(ids, skip_special=skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token, which may be part of a character; a special token's are its name."""
        return self._detokenizer.token_bytes(token_id, skip_special=False)

    def answer_bytes(self, ids: Iterable[int]) -> list[bytes]:
        """Bytes that each token adds to an answer's text; a special token's are none."""
        return [self._detokenizer.token_bytes(token_id) for token_id in ids]

    def stream(self, skip_special: bool = True, *, keeps_first_space: bool = False) -> TextStream:
        """A fresh stream for one answer."""
        return TextStream(self._detokenizer, skip_special=skip_special, keeps_first_space=keeps_first_space)

    def _render(self, roles: tuple[ChatRole, ...]) -> str:
        """The template's text, with markers where the contents belong."""
        if self._template is None:
            raise InvalidRequest("chat", True, "the model has no chat template; use raw completion")
        text = self._template.text(roles)
        found = Counter(_MARKER.findall(text))
        if any(int(number) >= len(roles) for number in found):
            raise InvalidRequest(
                "chat", True, "the chat template writes what stands for no message; use raw completion"
            )
        if (copies := max(found.values(), default=0)) > _MAX_COPIES:
            raise InvalidRequest("chat", True, f"the chat template writes a message {copies} times; use raw completion")
        return text

    def _chat_template(self, source: str, now: Callable[[], datetime]) -> ChatTemplate:
        variables = {
            "add_generation_prompt": True,
            "bos_token": self._token(self._text.bos_token_id),
            "eos_token": self._token(next(iter(self.eos_token_ids), None)),
            "tools": None,
            "documents": None,
        }
        return ChatTemplate(source, variables, lambda number: f"{PADDING}\ue000{number}\ue001{PADDING}", now)

    def _token(self, token_id: int | None) -> str:
        return "" if token_id is None else self._first.id_to_token(token_id) or ""

    def _encode_around(self, rendered: str, contents: Sequence[str]) -> Iterator[NDArray[np.int64]]:
        """Ids of the rendered template with the contents in their places.

        Special tokens are recognised only in the template's own text. The text between two of them, content included,
        is encoded as one run, as a tokenizer does that sees everything at once.
        """
        # Text and the number of the content behind it, in turn.
        before, *rest = _MARKER.split(rendered)
        runs: list[str] = [""]
        specials: list[str] = []
        self._append_template(before.removesuffix(PADDING), runs, specials)
        for number, after in zip(rest[::2], rest[1::2], strict=True):
            content = contents[int(number)]
            kept = content if before.endswith(PADDING) else content.lstrip()
            runs[-1] += kept if after.startswith(PADDING) else kept.rstrip()
            self._append_template(after.removeprefix(PADDING).removesuffix(PADDING), runs, specials)
            before = after
        return self._join(runs, specials)

    def _append_template(self, text: str, runs: list[str], specials: list[str]) -> None:
        end = 0
        for begin, after in self._special_finder.encode(text).offsets:
            runs[-1] += text[end:begin]
            specials.append(text[begin:after])
            runs.append("")
            end = after
        runs[-1] += text[end:]

    def _join(self, runs: list[str], specials: list[str]) -> Iterator[NDArray[np.int64]]:
        for index, run in enumerate(runs):
            if index > 0:
                special = self._special[specials[index - 1]]
                yield _one(self._first.token_to_id(special.content))
                run = run.lstrip() if special.rstrip else run
            if index < len(specials) and self._special[specials[index]].lstrip:
                run = run.rstrip()
            if run:
                yield from (self._first_pieces if index == 0 else self._inner_pieces).pieces(run)


def _collect(pieces: Iterable[NDArray[np.int64]], progress: Progress) -> NDArray[np.int64]:
    kept, num_ids = [np.empty(0, dtype=np.int64)], 0
    for piece in pieces:
        kept.append(piece)
        num_ids += len(piece)
        progress(num_ids)
    return np.concatenate(kept)


def _one(token_id: int) -> NDArray[np.int64]:
    return np.array([token_id], dtype=np.int64)


def _finder(contents: Iterable[str]) -> Any:
    """A tokenizer that knows nothing but these tokens.

    It finds the longest of those that begin at a place, in time for the text's length alone; there may be many.
    """
    finder = tokenizers.Tokenizer(tokenizers.models.BPE())
    finder.add_tokens([tokenizers.AddedToken(content, normalized=False, special=True) for content in contents])
    return finder


def _content_pieces(encoder: Any, *, is_linear: bool) -> PieceEncoder:
    """Content has no special tokens: none is found in it, and none is put around it."""
    encoder.encode_special_tokens = True
    encoder.post_processor = None
    if is_linear:
        return PieceEncoder(encoder)
    return PieceEncoder(encoder, window_chars=SHORT_WINDOW_CHARS, max_window_chars=SHORT_WINDOW_CHARS)


def _without_first_space(encoder: Any) -> Any:
    """The same tokenizer for text that follows a special token; None where it is no other.

    Metaspace with the scheme "first" puts a space before the very beginning of a text; a run encoded on its
    own would get one too.
    """
    changed = part_of(encoder.pre_tokenizer) or {}
    steps = changed.get("pretokenizers", [changed])
    first = [step for step in steps if step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first"]
    if not first:
        return None
    for step in first:
        step["prepend_scheme"] = "never"
    inner = tokenizers.Tokenizer.from_str(encoder.to_str())
    pre_tokenizer = inner.pre_tokenizer
    pre_tokenizer.__setstate__(json.dumps(changed).encode())
    inner.pre_tokenizer = pre_tokenizer
    return inner
