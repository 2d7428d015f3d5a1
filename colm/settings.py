"""Options that the cluster and the nodes have in common. Each has one owner: its name, default, limits and meaning."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from colm import defaults


class Settings(BaseModel):
    """A group of options: part of a section of the cluster's file, and flags of a node that is run by hand."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    flag_prefix: ClassVar[str] = ""
    """Before the names of its flags."""


class PlacementSettings(Settings):
    """Where a node computes."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:(0|[1-9][0-9]?))?)$")] = "auto"
    """Device of a node: "cpu", "cuda" or "cuda:N"; auto: the GPU that Ray sets aside, or the CPU without one."""
    num_threads: PositiveInt | None = None
    """CPU threads of a node; by default one for each core that it may run on."""

    @property
    def resolved_device(self) -> str:
        """The device that auto stands for."""
        return "cpu" if self.device == "auto" else self.device


class DtypeSettings(Settings):
    """What all nodes compute in."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of weights, computation and KV cache; auto: bfloat16 if fast on both roles' devices, else float32."""


class PrefillLineSettings(Settings):
    """The line for a prefill node, at either end."""

    max_queued: PositiveInt = defaults.MAX_QUEUED
    """Prompts that may wait for a prefill node, at it and at each decode node; the next is refused."""


def explain(error: ValidationError, name_of: Callable[[str], str]) -> str:
    """What is wrong with options, in one line.

    Args:
        error: of a `Settings`, or of a model of them.
        name_of: an option as its user spells it, from its names joined by dots.
    """
    return "; ".join(_explained(dict(found), name_of) for found in error.errors())


def _explained(found: dict[str, Any], name_of: Callable[[str], str]) -> str:
    option = ".".join(str(part) for part in found["loc"])
    if found["type"] == "value_error":  # a check of ours, whose message begins with an option's name
        return name_of(".".join(filter(None, (option, str(found["ctx"]["error"])))))
    if found["type"] == "missing":
        return f"{name_of(option)} is not set"
    if found["type"] == "extra_forbidden":
        return f"{name_of(option)} is not an option; `colm config` lists them"
    return f"{name_of(option)}={found['input']!r}: {found['msg']}"
