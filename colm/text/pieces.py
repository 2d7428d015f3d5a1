"""Token ids of a long text, encoded window by window, the same as those of the whole text at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colm.errors import InvalidRequest

WINDOW_CHARS = 65_537
"""How many characters later the next window ends: a prime. Rules that count from the end of a text, such as groups of
three digits, then give other tokens in the next window, so equal tokens are never a coincidence."""
MAX_WINDOW_CHARS = 16 * WINDOW_CHARS
"""The longest window; a text that has no safe cut in it is refused."""
SHORT_WINDOW_CHARS = 16_411
"""The same for a tokenizer that takes time for the square of a window: about a second, at most."""
OVERLAP_CHARS = 4096
"""Characters that two windows share. The end of a text changes a word or two, a few tokens: far less than this."""

_Cut = tuple[int, int]
"""Where two windows meet: the index of a token in the first window, and of the same token in the second."""


@dataclass(frozen=True, slots=True)
class _Window:
    """Tokens of `text[begin:end]`."""

    begin: int
    end: int
    ids: NDArray[np.int64]
    spans_N2: NDArray[np.int64]
    """Characters of the whole text that each token covers."""
    starts_word_N: NDArray[np.bool_]


class PieceEncoder:
    """Encodes texts of any length in the memory of one window.

    Neighbouring windows overlap. The ids are cut inside the overlap, where both windows have the same tokens at the
    same characters over half of its length; if there is no such place, the first window grows. Equal tokens are enough:

    - Words are cut from left to right, and a window begins at a word if it can. From a common beginning on, both
      windows have the same words, up to those that the first window's end cuts short.
    - Inside a word, BPE is local: a sequence of tokens is the encoding of its text if each two neighbours are the
      encoding of theirs. So the tokens before a shared token and those after it fit together.

    Args:
        encoder: a `tokenizers.Tokenizer`.
        window_chars: see `WINDOW_CHARS`.
        overlap_chars: see `OVERLAP_CHARS`; longer where a token is long.
        max_window_chars: see `MAX_WINDOW_CHARS`.
    """

    def __init__(
        self,
        encoder: Any,
        *,
        window_chars: int = WINDOW_CHARS,
        overlap_chars: int = OVERLAP_CHARS,
        max_window_chars: int = MAX_WINDOW_CHARS,
    ) -> None:
        longest = max(map(len, encoder.get_vocab(with_added_tokens=True)), default=1)
        self._encoder = encoder
        self._window_chars = window_chars
        self._max_window_chars = max_window_chars
        self._overlap_chars = max(overlap_chars, 16 * longest)

    def pieces(self, text: str) -> Iterator[NDArray[np.int64]]:
        """Ids of the text, piece by piece; end to end they are the encoder's ids of the whole text.

        Raises:
            InvalidRequest: the tokenizer gives up on the text, or leaves no place to cut it.
        """
        window = self._window(text, 0, self._window_chars)
        # [0, first)  tokens of this window that came with the piece before
        first, agreed = 0, (0, 0)
        while window.end < len(text):
            begin = self._next_begin(window)
            if begin is not None:
                following = self._window(text, begin, window.end + self._window_chars)
                overlap = begin + self._overlap_chars // 4, begin + self._overlap_chars * 3 // 4
                if cut := _meet(window, following, overlap):
                    yield window.ids[first : cut[0]]
                    window, first, agreed = following, cut[1], overlap
                    continue
            grown = again = None
            if 2 * (window.end - window.begin) <= self._max_window_chars:
                grown = self._window(text, window.begin, 2 * window.end - window.begin)
                again = (0, 0) if first == 0 else _meet(window, grown, agreed)
            if grown is None or again is None:
                limit = f"the tokenizer leaves no place to cut {window.end - window.begin} characters; break them up"
                raise InvalidRequest("document", text[window.begin : window.begin + 20], limit)
            window, first = grown, again[1]
        yield window.ids[first:]

    def _next_begin(self, window: _Window) -> int | None:
        """Where the next window may begin: at a word, at a token inside a very long word, or nowhere."""
        starts = window.spans_N2[:, 0]
        usable = (starts > window.begin + self._overlap_chars) & (starts <= window.end - self._overlap_chars)
        for wanted in (usable & window.starts_word_N, usable):
            if wanted.any():
                return int(starts[wanted][-1])
        return None

    def _window(self, text: str, begin: int, end: int) -> _Window:
        end = min(end, len(text))
        encoding = _encode(self._encoder, text[begin:end])
        words = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
        return _Window(
            begin=begin,
            end=end,
            ids=np.array(encoding.ids, dtype=np.int64),
            spans_N2=np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + begin,
            starts_word_N=np.diff(words, prepend=-1) != 0,
        )


def _meet(left: _Window, right: _Window, chars: tuple[int, int]) -> _Cut | None:
    """The first token that starts in a range of characters, if both windows have the same tokens there."""
    (i, i_end), (j, j_end) = (np.searchsorted(window.spans_N2[:, 0], chars) for window in (left, right))
    same = i < i_end and np.array_equal(left.ids[i:i_end], right.ids[j:j_end])
    if same and np.array_equal(left.spans_N2[i:i_end], right.spans_N2[j:j_end]):
        return int(i), int(j)
    return None


def _encode(encoder: Any, text: str) -> Any:
    try:
        # The batch call, since the other one holds Python's lock.
        (encoding,) = encoder.encode_batch([text], add_special_tokens=False)
    except BaseException as err:
        # A panic of the Rust side, such as a regex at its limit of backtracking. Its class cannot be imported.
        if type(err).__name__ != "PanicException":
            raise
        raise InvalidRequest("document", text[:20], f"the model's tokenizer cannot read it: {err}") from err
    return encoding
