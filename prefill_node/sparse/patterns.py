"""The pattern of each head, as a search found it, and the file that keeps them."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Self

from colm.errors import ConfigError
from colm.model.config import ChainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pattern:
    score: float = 1.0
    """Share of the attention that a search found recalled."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "score" and getattr(self, field.name) < 1:
                raise ValueError(f"{field.name}={getattr(self, field.name)} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class AShape(_Pattern):
    """The first keys and the nearest ones, whatever the prompt."""

    kind: ClassVar[str] = "stream_llm"
    sink_tokens: int
    local_tokens: int

    @property
    def sizes(self) -> tuple[int, int]:
        """As the file has them."""
        return self.sink_tokens, self.local_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class VerticalSlash(_Pattern):
    """The key columns and the diagonals of most attention, chosen for each prompt."""

    kind: ClassVar[str] = "vertical_and_slash"
    num_verticals: int
    num_slashes: int

    @property
    def sizes(self) -> tuple[int, int]:
        """As the file has them."""
        return self.num_verticals, self.num_slashes


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSparse(_Pattern):
    """The key blocks of most attention between means of blocks, chosen for each row block."""

    kind: ClassVar[str] = "block_sparse"
    num_blocks: int

    @property
    def sizes(self) -> tuple[int, int]:
        """As the file has them; the second has no meaning."""
        return self.num_blocks, 1


HeadPattern = AShape | VerticalSlash | BlockSparse
_KINDS = (AShape.kind, VerticalSlash.kind, BlockSparse.kind)


@dataclass(frozen=True, slots=True)
class PatternFile:
    """A pattern for every layer and query head of chain 1.

    On disk it is MInference's config: a list over layers of `{"head": [type, vertical_size, slash_size, score]}`. Types
    are `stream_llm` (first and nearest keys), `vertical_and_slash` and `block_sparse` (number of blocks; the other size
    has no meaning).
    """

    layers: tuple[tuple[HeadPattern, ...], ...]

    @classmethod
    def read(cls, path: Path, config: ChainConfig) -> Self:
        """Read a file and hold it against the model it shall serve.

        Raises:
            ConfigError: the file cannot be read, is of another model, or a field is wrong; names file, layer, head and
                field.
        """
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except OSError as err:
            raise ConfigError(f"{path} cannot be read: {err.strerror}") from err
        except ValueError as err:
            raise ConfigError(f"{path} is not valid JSON: {err}") from err
        if not isinstance(body, list) or not all(isinstance(layer, dict) for layer in body):
            raise ConfigError(f"{path} must be a list with one object for each layer")
        if len(body) != config.num_layers:
            raise ConfigError(f"{path} is of a model of {len(body)} layers; this one has {config.num_layers}")
        return cls(tuple(_layer(path, number, layer, config.chains[0]) for number, layer in enumerate(body)))

    def write(self, path: Path) -> None:
        """Write the file, a line for each layer.

        Raises:
            ConfigError: the path cannot be written.
        """
        layers = [{str(head): [p.kind, *p.sizes, p.score] for head, p in enumerate(heads)} for heads in self.layers]
        try:
            path.write_text("[\n" + ",\n".join(map(json.dumps, layers)) + "\n]\n", encoding="utf-8")
        except OSError as err:
            raise ConfigError(f"{path} cannot be written: {err.strerror}") from err


def _layer(path: Path, number: int, heads: Mapping[str, object], num_heads: int) -> tuple[HeadPattern, ...]:
    expected = [str(head) for head in range(num_heads)]
    if set(heads) != set(expected):
        odd = sorted(set(heads) ^ set(expected))
        raise ConfigError(
            f"{path}: layer {number} has {len(heads)} heads, expected 0 to {num_heads - 1}, chain 1's; see {odd[:3]}"
        )
    return tuple(_pattern(f"{path}: layer {number}, head {head}", heads[head]) for head in expected)


def _pattern(where: str, entry: object) -> HeadPattern:
    if not isinstance(entry, list) or len(entry) != 4:
        raise ConfigError(f"{where}: {entry!r} must be [type, vertical_size, slash_size, score]")
    kind, *sizes, score = entry
    for name, size in zip(("vertical_size", "slash_size"), sizes, strict=True):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"{where}: {name}={size!r} must be a whole number of at least 1")
    if not isinstance(score, int | float) or isinstance(score, bool) or not math.isfinite(score):
        raise ConfigError(f"{where}: score={score!r} must be a finite number")
    match kind:
        case AShape.kind:
            return AShape(sink_tokens=sizes[0], local_tokens=sizes[1], score=score)
        case VerticalSlash.kind:
            return VerticalSlash(num_verticals=sizes[0], num_slashes=sizes[1], score=score)
        case BlockSparse.kind:
            return BlockSparse(num_blocks=sizes[0], score=score)
    raise ConfigError(f"{where}: type={kind!r} is unknown; use one of {', '.join(_KINDS)}")
