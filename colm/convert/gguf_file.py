"""A GGUF file: its metadata by key, its tensors by name."""

import math
import mmap
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from torch import Tensor

from colm.convert.llama import common_dtype
from colm.errors import CheckpointError, UnsupportedModel
from colm.files import require_plain

FLOAT_TYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
QUANTISED_TYPES = (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1)

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_MAX_PARTS: Final = 1 << 14
"""Tensors, and keys of metadata."""
_MAX_NAME_BYTES: Final = 1 << 10
_MAX_TEXT_BYTES: Final = 4 << 20
"""Of one value, such as a chat template."""
_MAX_ENTRIES: Final = 1 << 20
"""Of all arrays together, such as the vocabulary: each is walked over, and may become an object."""
_LENGTH: Final = struct.Struct("<Q")
_MAX_DIMENSIONS: Final = 4
_NUMBERS: Final = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}


class _Malformed(Exception):
    """The file is not what it says; the message names the place."""


@dataclass(frozen=True, slots=True)
class _Texts:
    """Texts of the file's bytes, which become objects when somebody asks for them."""

    offset: int
    """From the file's beginning; there the first one's length stands."""
    count: int | None
    """None for a text that is not in an array."""


@dataclass(frozen=True, slots=True)
class _Stored:
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """In PyTorch's order."""
    offset: int
    """From the file's beginning."""
    num_bytes: int


class GgufFile:
    """An opened GGUF file; a `TensorSource`. What it says of its parts is held against its size before they are read.

    Raises:
        CheckpointError: not a GGUF file, or truncated.
        UnsupportedModel: a tensor has a type that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = require_plain(path)
            with path.open("rb") as file:
                # An empty file cannot be mapped.
                self._data: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            self._fields, self._tensors = _read_header(_Cursor(self._data))
        except FileNotFoundError as err:
            raise CheckpointError(f"{path} does not exist; give a GGUF file") from err
        except OSError as err:
            raise CheckpointError(f"{path} cannot be read: {err.strerror}") from err
        except _Malformed as err:
            raise CheckpointError(f"{path} is truncated or not a GGUF file: {err}; fetch it again") from err
        for name, tensor in self._tensors.items():
            if tensor.kind not in (*FLOAT_TYPES, *QUANTISED_TYPES):
                readable = ", ".join(kind.name for kind in (*FLOAT_TYPES, *QUANTISED_TYPES))
                raise UnsupportedModel(
                    f"{path}: tensor {name!r} has type {tensor.kind.name}; use a file of {readable} only"
                )

    def metadata(self, key: str) -> Any:
        """Value of a key as plain Python: str, bool, int, float or a list; None where the file lacks it.

        Raises:
            CheckpointError: text that is not UTF-8.
        """
        value = self._fields.get(key)
        if isinstance(value, np.ndarray):
            return value.tolist()
        if not isinstance(value, _Texts):
            return value
        cursor = _Cursor(self._data, value.offset)
        try:
            texts = [
                cursor.text(f"metadata {key!r}").decode() for _ in range(1 if value.count is None else value.count)
            ]
        except UnicodeDecodeError as err:
            raise CheckpointError(f"{self.path}: metadata {key!r} is not UTF-8; convert the model again") from err
        except _Malformed as err:
            raise CheckpointError(f"{self.path}: {err}; convert the model again") from err
        return texts[0] if value.count is None else texts

    def required(self, key: str) -> Any:
        """Value of a key that the model cannot be built without.

        Raises:
            CheckpointError: the file lacks it.
        """
        value = self.metadata(key)
        if value is None:
            raise CheckpointError(f"{self.path}: metadata {key!r} is missing; convert the model again")
        return value

    def names(self) -> Collection[str]:
        """Every tensor of the file."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in PyTorch's order; GGUF writes the fastest dimension first."""
        return self._tensors[name].shape

    def read(self, name: str) -> Tensor:
        """The tensor in float32, which holds each supported type exactly."""
        tensor = self._tensors[name]
        data = np.frombuffer(self._data, np.uint8, tensor.num_bytes, tensor.offset)
        values = dequantize(data.reshape(*tensor.shape[:-1], -1), tensor.kind)
        # The file is mapped read-only, and a float32 tensor is not copied by dequantising it.
        return torch.from_numpy(np.require(values, np.float32, ["C", "W"]).reshape(tensor.shape))

    def natural_dtype(self) -> torch.dtype:
        """bfloat16 where anything is quantised; else the matrices' float type, the widest of several.

        Gains do not count: converters write them in float32 whatever the model was trained in.
        """
        kinds = {tensor.kind for tensor in self._tensors.values() if len(tensor.shape) > 1}
        if kinds & set(QUANTISED_TYPES):
            return torch.bfloat16
        return common_dtype([FLOAT_TYPES[kind] for kind in kinds])


class _Cursor:
    """A place in the file's bytes."""

    def __init__(self, data: Any, position: int = 0) -> None:
        self._data = data
        self.position = position
        self._num_entries = 0

    @property
    def num_left(self) -> int:
        return len(self._data) - self.position

    def take(self, num_bytes: int, what: str) -> bytes:
        self.skip(num_bytes, what)
        taken: bytes = self._data[self.position - num_bytes : self.position]
        return taken

    def whole(self, layout: str, what: str) -> int:
        number: int = struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]
        return number

    def count(self, what: str, *, smallest_bytes: int, limit: int = _MAX_PARTS) -> int:
        """How many things follow, each of which takes some bytes."""
        number = self.whole("<Q", what)
        if number > limit or number * smallest_bytes > self.num_left:
            raise _Malformed(f"{number} of {what} at byte {self.position} are more than it can hold")
        return number

    def count_entries(self, what: str, *, smallest_bytes: int) -> int:
        """How many entries of an array follow."""
        number = self.count(what, smallest_bytes=smallest_bytes, limit=_MAX_ENTRIES - self._num_entries)
        self._num_entries += number
        return number

    def numbers(self, dtype: Any, count: int, what: str) -> Any:
        """Numbers as they lie in the file."""
        position = self.position
        self.skip(count * dtype.itemsize, what)
        return np.frombuffer(self._data, dtype, count, position)

    def skip(self, num_bytes: int, what: str) -> None:
        if num_bytes > self.num_left:
            raise _Malformed(f"{what} at byte {self.position} has {num_bytes} bytes, and {self.num_left} are left")
        self.position += num_bytes

    def skip_texts(self, count: int, what: str) -> None:
        data, position, size = self._data, self.position, len(self._data)
        for _ in range(count):
            if position + _LENGTH.size > size:
                raise _Malformed(f"{what} goes on where the file ends")
            position += _LENGTH.size + _LENGTH.unpack_from(data, position)[0]
        if position > size:
            raise _Malformed(f"{what} goes on where the file ends")
        self.position = position

    def text(self, what: str, limit: int = _MAX_TEXT_BYTES) -> bytes:
        num_bytes = self.whole("<Q", what)
        if num_bytes > limit:
            raise _Malformed(f"{what} before byte {self.position} has {num_bytes} bytes, at most {limit} are read")
        return self.take(num_bytes, what)

    def name(self, what: str) -> str:
        data = self.text(what, _MAX_NAME_BYTES)
        try:
            return data.decode()
        except UnicodeDecodeError as err:
            raise _Malformed(f"{what} before byte {self.position} is not UTF-8") from err


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, _Stored]]:
    if cursor.take(len(_MAGIC), "the magic number") != _MAGIC:
        raise _Malformed("GGUF magic invalid")
    if (version := cursor.whole("<I", "version")) not in _VERSIONS:
        raise _Malformed(f"version {version} is not read, only {_VERSIONS} little-endian")
    num_tensors = cursor.count("tensors", smallest_bytes=24)
    fields: dict[str, Any] = {}
    for _ in range(cursor.count("metadata keys", smallest_bytes=13)):
        key = cursor.name("a metadata key")
        if key in fields:
            raise _Malformed(f"metadata {key!r} is there twice")
        fields[key] = _read_value(cursor, f"metadata {key!r}")
    alignment = fields.get("general.alignment", 32)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise _Malformed(f"general.alignment={alignment!r} must be a power of two, 8 or more")
    tensors: dict[str, _Stored] = {}
    for _ in range(num_tensors):
        name = cursor.name("a tensor's name")
        if name in tensors:
            raise _Malformed(f"tensor {name!r} is there twice")
        tensors[name] = _read_tensor(cursor, f"tensor {name!r}")
    begin = -(-cursor.position // alignment) * alignment
    end = cursor.position + cursor.num_left
    for name, tensor in tensors.items():
        if tensor.offset % alignment or begin + tensor.offset + tensor.num_bytes > end:
            raise _Malformed(
                f"tensor {name!r} has {tensor.num_bytes} bytes at {begin + tensor.offset}, the file ends at {end}"
            )
    return fields, {
        name: _Stored(tensor.kind, tensor.shape, begin + tensor.offset, tensor.num_bytes)
        for name, tensor in tensors.items()
    }


def _read_value(cursor: _Cursor, what: str) -> Any:
    kind = _value_type(cursor, what)
    if kind is GGUFValueType.STRING:
        texts = _Texts(cursor.position, None)
        cursor.skip_texts(1, what)
        return texts
    if kind is not GGUFValueType.ARRAY:
        return cursor.numbers(np.dtype(_NUMBERS[kind]), 1, what).item()
    kind = _value_type(cursor, what)
    if kind is GGUFValueType.ARRAY:
        raise _Malformed(f"{what} is an array of arrays")
    if kind is GGUFValueType.STRING:
        count = cursor.count_entries(what, smallest_bytes=_LENGTH.size)
        texts = _Texts(cursor.position, count)
        cursor.skip_texts(count, what)
        return texts
    return cursor.numbers(np.dtype(_NUMBERS[kind]), cursor.count_entries(what, smallest_bytes=1), what)


def _value_type(cursor: _Cursor, what: str) -> GGUFValueType:
    number = cursor.whole("<I", what)
    try:
        return GGUFValueType(number)
    except ValueError as err:
        raise _Malformed(f"{what} has the unknown type {number}") from err


def _read_tensor(cursor: _Cursor, what: str) -> _Stored:
    num_dimensions = cursor.whole("<I", what)
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise _Malformed(f"{what} has {num_dimensions} dimensions, 1 to {_MAX_DIMENSIONS} are read")
    shape = tuple(cursor.whole("<Q", what) for _ in range(num_dimensions))[::-1]
    number = cursor.whole("<I", what)
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as err:
        raise _Malformed(f"{what} has the unknown type {number}") from err
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    if not math.prod(shape) or shape[-1] % block_values:
        raise _Malformed(f"{what} of type {kind.name} cannot have the shape {shape}")
    num_bytes = math.prod(shape) // block_values * block_bytes
    return _Stored(kind, shape, cursor.whole("<Q", what), num_bytes)
