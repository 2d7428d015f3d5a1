"""What a user may set, in TOML; every option has a default that serves."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from colm import defaults
from colm.errors import ConfigError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelSection(_Section):
    """Section [model]."""

    path: Path | None = None
    """Checkpoint directory, on every node at the same place."""
    name: str | None = None
    """What clients call it; the directory's name by default."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights, computation and KV cache; auto is bfloat16 where both roles' devices are fast at it."""


class _PlacedSection(_Section):
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:(0|[1-9][0-9]?))?)$")] = "auto"
    """Where a replica computes: "cpu", "cuda" or "cuda:N"; auto is the GPU set aside, or the CPU without one."""
    num_gpus: NonNegativeInt = Field(default=0, le=1)
    """GPUs that Ray sets aside for a replica; with 0 any may be chosen by `device`, and shared."""
    num_threads: PositiveInt | None = None
    """CPU threads of a replica; all cores by default."""

    @property
    def resolved_device(self) -> str:
        """The device that auto stands for."""
        if self.device != "auto":
            return self.device
        return "cuda" if self.num_gpus else "cpu"


class PrefillSection(_PlacedSection):
    """Section [prefill]."""

    replicas: PositiveInt = 1
    """Each takes one of Ray's resource "prefill"."""
    tile_tokens: PositiveInt = defaults.TILE_TOKENS
    """Tokens computed and sent at a time."""
    attention_backend: Literal["auto", "flash_attn", "triton"] = "auto"
    """Of dense attention on a GPU; auto is flash-attn where it can be imported, Triton else."""
    max_queued: PositiveInt = defaults.MAX_QUEUED
    """Prompts of a decode replica that may wait for a prefill replica."""
    max_streams: PositiveInt = defaults.MAX_STREAMS
    """Prompts on a prefill replica at once; they take turns."""
    max_queued_s: PositiveFloat = defaults.MAX_QUEUED_S
    """Longest wait on a prefill replica, as estimated, that a new prompt is let into."""
    memory_bytes: ByteSize | None = None
    """Memory for the prompts that a replica has begun, e.g. "8GiB"; by default half of what is free as it starts."""


class DecodeSection(_PlacedSection):
    """Section [decode]."""

    replicas: PositiveInt = 1
    """Each takes one of Ray's resource "decode"."""
    kv_cache_bytes: ByteSize = ByteSize(defaults.KV_CACHE_BYTES)
    """Memory of a replica for keys and values, e.g. "4GiB"."""
    page_tokens: PositiveInt = defaults.PAGE_TOKENS
    """Tokens in a KV page."""
    max_batch_size: PositiveInt = defaults.MAX_BATCH_SIZE
    """Answers advanced together."""
    max_requests: PositiveInt = defaults.MAX_REQUESTS
    """Requests at once on a replica, waiting and prefilling ones included."""


class GatewaySection(_Section):
    """Section [gateway]."""

    host: str = "127.0.0.1"
    """Address to listen on; "0.0.0.0" lets other machines in, and "::" those of both IP versions."""
    port: NonNegativeInt = Field(default=50051, le=65535)
    """0 picks a free port."""
    max_document_bytes: ByteSize = ByteSize(64 << 20)
    """Longest document, e.g. "64MiB"."""
    max_requests: PositiveInt = defaults.MAX_REQUESTS
    """Requests inside the gateway at once."""
    default_max_new_tokens: PositiveInt = 256
    """Length of an answer for which the client asks none."""
    max_new_tokens: PositiveInt = 16384
    """The most a client may ask for."""
    default_timeout_s: PositiveFloat = 3600.0
    """Deadline of a request whose client sets none, before its work is added."""
    min_prefill_tokens_per_s: PositiveFloat = 15.0
    """Slowest prefill that such a deadline allows for."""
    min_decode_tokens_per_s: PositiveFloat = 2.0
    """Slowest decoding that such a deadline allows for."""
    max_timeout_s: PositiveFloat = 24 * 3600.0
    """The longest deadline a client may set."""


# What a request gets whose client asks for nothing, and the most that a client may ask for.
_LIMITED_DEFAULTS = {"default_max_new_tokens": "max_new_tokens", "default_timeout_s": "max_timeout_s"}


class SecuritySection(_Section):
    """Section [security]."""

    token: Literal["auto", "off"] = "auto"
    """auto makes a fresh token for clients; `colm submit` on this machine finds it by itself."""
    tls: Literal["auto", "off"] = "auto"
    """auto makes fresh certificates for the gateway and between nodes."""


class RaySection(_Section):
    """Section [ray]."""

    address: str | None = None
    """A running Ray cluster to join, e.g. "auto" or "10.0.0.1:6379"; by default `colm up` starts one here."""
    ready_timeout_s: PositiveFloat = 300.0
    """How long replicas may take to load."""


class ClusterConfig(_Section):
    """The whole file."""

    model: ModelSection = ModelSection()
    prefill: PrefillSection = PrefillSection()
    decode: DecodeSection = DecodeSection()
    gateway: GatewaySection = GatewaySection()
    security: SecuritySection = SecuritySection()
    ray: RaySection = RaySection()

    @property
    def placed(self) -> "dict[str, PrefillSection | DecodeSection]":
        """The roles that compute, by the names of their sections."""
        return {"prefill": self.prefill, "decode": self.decode}

    @property
    def resolved_dtype(self) -> str:
        """The dtype that auto stands for on this machine."""
        if self.model.dtype != "auto":
            return self.model.dtype
        # These bring PyTorch, which `colm submit` should not wait for.
        from colm.dtypes import dtype_name, fastest_dtype
        from colm.placement import parse_device

        fastest = {fastest_dtype(parse_device(section.resolved_device)) for section in self.placed.values()}
        return dtype_name(fastest.pop()) if len(fastest) == 1 else "float32"


def load_config(path: Path | None, overrides: dict[str, Any]) -> ClusterConfig:
    """Read a TOML file and put command-line options on top.

    Args:
        path: None for defaults alone.
        overrides: values by dotted option name; None values are left out.

    Raises:
        ConfigError: names the option, its value and what is allowed.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as err:
            raise ConfigError(f"cannot read {path}: {err.strerror}") from err
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
            raise ConfigError(f"{path} is not valid TOML: {err}") from err
    for option, value in overrides.items():
        if value is not None:
            section, name = option.split(".")
            options = values.setdefault(section, {})
            if not isinstance(options, dict):
                raise ConfigError(f"{section}={options!r} must be a section: [{section}]")
            options[name] = value
    try:
        config = ClusterConfig.model_validate(values)
    except ValidationError as err:
        raise ConfigError("; ".join(_explain(dict(error)) for error in err.errors())) from err
    _check_limits(config)
    _check_devices(config)
    return config


def _check_limits(config: ClusterConfig) -> None:
    for name, limit in _LIMITED_DEFAULTS.items():
        default, highest = getattr(config.gateway, name), getattr(config.gateway, limit)
        if default > highest:
            raise ConfigError(
                f"gateway.{name}={default} is above gateway.{limit}={highest}; lower the one or raise the other"
            )


def _check_devices(config: ClusterConfig) -> None:
    """Refuse a GPU that would stand idle beside its replica, and a backend that has no GPU."""
    for name, section in config.placed.items():
        if section.num_gpus and section.device == "cpu":
            raise ConfigError(
                f"{name}.device='cpu' leaves idle the GPU that {name}.num_gpus={section.num_gpus} sets aside; "
                'set num_gpus = 0, or device = "auto"'
            )
        if section.num_gpus and section.device not in ("auto", "cuda", "cuda:0"):
            raise ConfigError(
                f"{name}.device={section.device!r} with {name}.num_gpus={section.num_gpus}: a replica sees only the "
                'GPU that Ray sets aside for it, as cuda:0; set device = "auto", or num_gpus = 0'
            )
    backend = config.prefill.attention_backend
    if backend != "auto" and config.prefill.resolved_device == "cpu":
        raise ConfigError(
            f"prefill.attention_backend={backend!r} needs a GPU, and the prefill replicas compute on the CPU; "
            'set attention_backend = "auto", or prefill.num_gpus = 1'
        )


def default_toml() -> str:
    """Every option with its meaning and its default, as a file to start from."""
    lines = ["# Options of `colm up --config FILE`. What is commented out shows the default."]
    for section, field in ClusterConfig.model_fields.items():
        lines += ["", f"[{section}]"]
        defaults = field.get_default()
        for name, option in type(defaults).model_fields.items():
            lines += [f"# {option.description}", f"# {name} = {_toml(getattr(defaults, name))}"]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    match value:
        case None:
            return "..."
        case ByteSize():
            return f'"{value.human_readable(separator="")}"'
        case str():
            return f'"{value}"'
        case _:
            return str(value)


def _explain(error: dict[str, Any]) -> str:
    option = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{option} is not an option; `colm config` lists them"
    return f"{option}={error['input']!r}: {error['msg']}"
