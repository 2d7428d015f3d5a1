"""A machine, as far as a prefill is concerned: a few rates, each with its source; kept as TOML under `machines/`."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

FOLDER: Final = Path(__file__).parent / "machines"
_NUMBERS: Final = ("gemm_gflops_per_s", "attention_gflops_per_s", "memory_gb_per_s", "step_s")
_OPTIONAL: Final = ("decode_step_s", "stream_gb_per_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one tile costs in one layer, or a half of that."""

    linear_flops: float = 0.0
    attention_flops: float = 0.0
    weight_bytes: float = 0.0
    """Read once, however many rows use them."""
    moved_bytes: float = 0.0
    """Read and written by what is neither a product nor attention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Rates that a prefill reaches, not what a data sheet promises, unless the source says so.

    Raises:
        ValueError: a number is not positive.
    """

    name: str
    gemm_gflops_per_s: float
    """Of the products of a tile with a layer's weights."""
    attention_gflops_per_s: float
    """Of causal attention, counting only pairs that the mask leaves."""
    memory_gb_per_s: float
    step_s: float
    """Of the host, for one tile of one layer: the interpreter, launches, whatever does not depend on the rows."""
    overlaps_host: bool
    """Whether the host prepares a step while the device computes another, as beside a GPU."""
    decode_step_s: float | None = None
    """Of the host, for one layer of a decode step, where all layers run in one call; None where each takes `step_s`."""
    stream_gb_per_s: float | None = None
    """Of one KV stream between two processes of this machine; None where it was not measured."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each number comes from."""

    def __post_init__(self) -> None:
        for name in (*_NUMBERS, *_OPTIONAL):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{self.name}: {name}={value} must be above 0")

    def seconds(self, work: Work) -> float:
        """The device's time, without the host's."""
        linear_s = max(
            work.linear_flops / (self.gemm_gflops_per_s * 1e9), work.weight_bytes / (self.memory_gb_per_s * 1e9)
        )
        attention_s = work.attention_flops / (self.attention_gflops_per_s * 1e9)
        return linear_s + attention_s + work.moved_bytes / (self.memory_gb_per_s * 1e9)

    def step_seconds(self, device_s: float) -> float:
        """A step's time: the longer of the host's and the device's where they overlap, else both."""
        return self._with_host(self.step_s, device_s)

    def decode_layer_seconds(self, device_s: float) -> float:
        """Likewise, of one layer of a decode step."""
        return self._with_host(self.step_s if self.decode_step_s is None else self.decode_step_s, device_s)

    def _with_host(self, host_s: float, device_s: float) -> float:
        return max(host_s, device_s) if self.overlaps_host else host_s + device_s

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a machine file.

        Raises:
            ValueError: a field is missing or unknown, or a number has no source.
        """
        body: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        name, overlaps_host = body.pop("name", None), body.pop("overlaps_host", None)
        if missing := [each for each in _NUMBERS if each not in body]:
            raise ValueError(f"{path}: {missing} are missing")
        if unknown := [each for each in body if each not in (*_NUMBERS, *_OPTIONAL)]:
            raise ValueError(f"{path}: {unknown} are unknown")
        if not isinstance(name, str) or not isinstance(overlaps_host, bool):
            raise ValueError(f"{path}: name must be a text and overlaps_host true or false")
        for each, entry in body.items():
            if not isinstance(entry, dict) or set(entry) != {"value", "source"}:
                raise ValueError(f"{path}: [{each}] must have value and source, and nothing else")
        return cls(
            name=name,
            overlaps_host=overlaps_host,
            sources={each: entry["source"] for each, entry in body.items()},
            **{each: entry["value"] for each, entry in body.items()},
        )

    def dump(self) -> str:
        """The text of its machine file."""
        # A JSON string is a TOML string.
        lines = [f"name = {json.dumps(self.name)}", f"overlaps_host = {json.dumps(self.overlaps_host)}"]
        for each in (*_NUMBERS, *_OPTIONAL):
            if (value := getattr(self, each)) is not None:
                lines += ["", f"[{each}]", f"value = {value!r}", f"source = {json.dumps(self.sources[each])}"]
        return "\n".join(lines) + "\n"


def machine(name: str) -> Machine:
    """A machine by its file's name, e.g. `h100`."""
    return Machine.load(FOLDER / f"{name}.toml")
