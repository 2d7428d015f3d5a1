"""A GGUF file: its metadata by key, its tensors by name."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from colm.convert.llama import common_dtype
from colm.errors import CheckpointError, UnsupportedModel

FLOAT_TYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
QUANTISED_TYPES = (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1)


class GgufFile:
    """An opened GGUF file; a `TensorSource`.

    Raises:
        CheckpointError: not a GGUF file, or truncated.
        UnsupportedModel: a tensor has a type that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = GGUFReader(path)
        except FileNotFoundError as err:
            raise CheckpointError(f"{path} does not exist; give a GGUF file") from err
        except (ValueError, IndexError, KeyError, OverflowError) as err:
            raise CheckpointError(f"{path} is truncated or not a GGUF file: {err}; fetch it again") from err
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        for tensor in reader.tensors:
            if tensor.tensor_type not in (*FLOAT_TYPES, *QUANTISED_TYPES):
                readable = ", ".join(kind.name for kind in (*FLOAT_TYPES, *QUANTISED_TYPES))
                raise UnsupportedModel(
                    f"{path}: tensor {tensor.name!r} has type {tensor.tensor_type.name}; use a file of {readable} only"
                )

    def metadata(self, key: str) -> Any:
        """Value of a key as plain Python: str, bool, int, float or a list; None where the file lacks it."""
        return self._fields[key].contents() if key in self._fields else None

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
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str) -> Tensor:
        """The tensor in float32, which holds each supported type exactly."""
        tensor = self._tensors[name]
        values = dequantize(tensor.data, tensor.tensor_type)
        # The file is mapped read-only, and a float32 tensor is not copied by dequantising it.
        return torch.from_numpy(np.require(values, np.float32, ["C", "W"]).reshape(self.shape(name)))

    def natural_dtype(self) -> torch.dtype:
        """bfloat16 where anything is quantised; else the matrices' float type, the widest of several.

        Gains do not count: converters write them in float32 whatever the model was trained in.
        """
        kinds = {tensor.tensor_type for tensor in self._tensors.values() if len(tensor.shape) > 1}
        if kinds & set(QUANTISED_TYPES):
            return torch.bfloat16
        return common_dtype([FLOAT_TYPES[kind] for kind in kinds])
