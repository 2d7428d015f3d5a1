"""What every LLaMA source has in common: which tensor becomes which of chain 1's, and the checks."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from colm.dtypes import DTYPES, dtype_name
from colm.errors import CheckpointError, UnsupportedModel
from colm.finite import NOT_FINITE, is_finite
from colm.model import parameter_shapes
from colm.model.config import ChainConfig

Progress = Callable[[int, int], None]
"""Called after each tensor with (tensors done, tensors in all)."""


class TensorSource(Protocol):
    """Named tensors on disk, read one at a time."""

    @property
    def path(self) -> Path:
        """What error messages call the source."""

    def names(self) -> Collection[str]:
        """Every tensor of the source."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, in PyTorch's order, without reading it."""

    def read(self, name: str) -> Tensor:
        """One tensor, in its stored float dtype; float32 where it was quantised."""


def chain_config(source: Path, **values: Any) -> ChainConfig:
    """Build the config of a one-chain model, with the source named in the error.

    Args:
        source: what the values were read from.
        values: fields of `ChainConfig` other than `chains`; `explicit_head_dim` may repeat the default.

    Raises:
        UnsupportedModel: the values do not fit together.
    """
    num_heads, head_dim, dim = values["num_heads"], values["explicit_head_dim"], values["dim"]
    if all(isinstance(value, int) for value in (num_heads, head_dim, dim)) and head_dim * num_heads == dim:
        values["explicit_head_dim"] = None
    try:
        return ChainConfig(chains=(num_heads,), **values)
    except ValueError as err:
        raise UnsupportedModel(f"{source}: {err}; only a LLaMA whose dimensions fit can be imported") from err


def source_names(config: ChainConfig, layout: Mapping[str, str]) -> dict[str, str]:
    """Our tensor names against the source's.

    Args:
        config: a one-chain model.
        layout: our name -> the source's name, both with `{}` for the layer. The head is left out where it is
            tied.
    """
    names: dict[str, str] = {}
    for ours, theirs in layout.items():
        layers = range(config.num_layers) if "{}" in ours else range(1)
        names |= {ours.format(layer): theirs.format(layer) for layer in layers}
    return {ours: names[ours] for ours in parameter_shapes(config)}


def common_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds them all without loss."""
    return reduce(torch.promote_types, dtypes)


def check_dtype(dtype: torch.dtype | None) -> None:
    """Refuse a dtype that no checkpoint can have.

    Raises:
        UnsupportedModel: names it and those that can be chosen.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise UnsupportedModel(f"dtype={dtype_name(dtype)} cannot be stored; use one of {', '.join(DTYPES)}")


def carry_over(
    config: ChainConfig,
    layout: Mapping[str, str],
    source: TensorSource,
    dtype: torch.dtype,
    *,
    convert: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Read every tensor of a one-chain model.

    Args:
        config: shape of the model.
        layout: as in `source_names`.
        source: where the tensors lie; what the layout does not name is not read.
        dtype: cast to this.
        convert: applied to (our name, tensor) before the cast.
        progress: told after each tensor.

    Returns:
        Exactly the tensors of `parameter_shapes(config)`.

    Raises:
        CheckpointError: a tensor is missing, misshapen or not finite; named as the source names it.
    """
    shapes = parameter_shapes(config)
    names = source_names(config, layout)
    stored = frozenset(source.names())
    for ours, theirs in names.items():
        if theirs not in stored:
            raise CheckpointError(f"{source.path}: tensor {theirs!r} is missing; fetch the whole model again")
        if source.shape(theirs) != tuple(shapes[ours]):
            raise CheckpointError(
                f"{source.path}: tensor {theirs!r} has shape {source.shape(theirs)}, but the config asks for "
                f"{tuple(shapes[ours])}; config and weights are not of one model"
            )
    tensors = {}
    for done, (ours, theirs) in enumerate(names.items(), start=1):
        tensors[ours] = convert(ours, source.read(theirs)).to(dtype)
        if not is_finite(tensors[ours]):
            raise CheckpointError(f"{source.path}: tensor {theirs!r} {NOT_FINITE}; fetch the model again")
        if progress is not None:
            progress(done, len(names))
    return tensors


def check_num_layers(source: TensorSource, config: ChainConfig) -> None:
    """Refuse more layers than the source can have, before there is a list of all their names.

    Raises:
        CheckpointError: it has fewer tensors than layers.
    """
    if config.num_layers > (found := len(source.names())):
        raise CheckpointError(f"{source.path}: it has {found} tensors, too few for {config.num_layers} layers")


def refuse_unknown(source: TensorSource, known: Collection[str]) -> None:
    """Refuse a source with a tensor that the model has no place for: it would not be the same function.

    Raises:
        UnsupportedModel: names the first such tensor.
    """
    if unknown := sorted(set(source.names()) - set(known)):
        raise UnsupportedModel(
            f"{source.path}: tensor {unknown[0]!r} has no place in a LLaMA "
            f"({len(unknown)} such tensors); import a model without it"
        )
