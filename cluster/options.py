"""The options of a cluster, read from TOML. Every option but the model's path has a working default."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    ByteSize,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from cluster.autoscaling.policy import ScalingLimits
from cluster.autoscaling.signals import PoolScaling
from colm import defaults
from colm.errors import ConfigError
from colm.nodes import Role, pool_name
from colm.settings import DtypeSettings, PlacementSettings, Settings, explain
from colm.tracing import TraceFiles
from decode_node.settings import DecodeSettings, PrefillPoolSettings
from prefill_node.settings import PrefillSettings


class _ReplicaSettings(PlacementSettings):
    """How many replicas there are, and where."""

    replicas: PositiveInt = 1
    """Number of replicas; each takes 1 of Ray's custom resource that `resource` names."""
    standby: NonNegativeInt = 0
    """Replicas besides these, so that while one restarts as many as `replicas` are there; they serve as well."""
    max_replicas: PositiveInt | None = None
    """Most replicas, standby among them, that the load may bring; by default, and up to those, their number stays."""
    scale_up_s: PositiveFloat = 30.0
    """Seconds over which the load's mean says whether more replicas are wanted."""
    scale_down_s: PositiveFloat = 600.0
    """Seconds for which fewer must have been enough before any goes; what it has goes on at another one."""
    num_gpus: NonNegativeInt = Field(default=0, le=1)
    """GPUs that Ray sets aside for each replica, 0 or 1; with 0, replicas may share the GPU that `device` names."""

    @property
    def num_replicas(self) -> int:
        """All that run when none is lost, or at the least."""
        return self.replicas + self.standby

    @property
    def most_replicas(self) -> int:
        """All that run when none is lost, at the most."""
        return max(self.num_replicas, self.max_replicas or 0)

    def _scaling(self, role: Role, target: float) -> PoolScaling | None:
        if self.most_replicas == self.num_replicas:
            return None
        limits = ScalingLimits(
            min_replicas=self.num_replicas,
            max_replicas=self.most_replicas,
            up_s=self.scale_up_s,
            down_s=self.scale_down_s,
        )
        return PoolScaling(role=role, limits=limits, target=target)

    @property
    def resolved_device(self) -> str:
        """The device that auto stands for."""
        return "cuda" if self.device == "auto" and self.num_gpus else super().resolved_device


_Resource = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


# Of several bases, the last one's options come first in the file.
class PrefillSection(PrefillSettings, PrefillPoolSettings, _ReplicaSettings):
    """Section [prefill]."""

    resource: _Resource = "prefill"
    """Ray's custom resource of the machines that these replicas go to, as `ray start --resources` names it."""
    target_queue_s: PositiveFloat = 10.0
    """Seconds of engine time, as estimated, that may be queued for each replica before the load wants one more."""

    @property
    def scaling(self) -> PoolScaling | None:
        """How their number follows the load; None where it stays."""
        return self._scaling(Role.PREFILL, self.target_queue_s)


class DecodeSection(DecodeSettings, _ReplicaSettings):
    """Section [decode]."""

    resource: _Resource = "decode"
    """Ray's custom resource of the machines that these replicas go to, as `ray start --resources` names it."""
    target_use: float = Field(default=0.8, gt=0, le=1)
    """Share of its KV pages and of max_batch_size that each replica may have in use before the load wants one more."""

    @property
    def scaling(self) -> PoolScaling | None:
        """How their number follows the load; None where it stays."""
        return self._scaling(Role.DECODE, self.target_use)


class VariantSection(DecodeSection):
    """Section [model.variants.NAME]: a further model, and the options of its own decode replicas."""

    path: Path
    """Checkpoint directory, at the same path on every machine."""


class ModelSection(DtypeSettings):
    """Section [model]."""

    path: Path | None = None
    """Checkpoint directory, at the same path on every machine; required here or as --model."""
    name: str | None = None
    """Name of the model in clients' requests; by default the directory's name."""
    variants: dict[str, VariantSection] = Field(default_factory=dict)
    """Further models, each a section of its own, e.g. [model.variants.legal]: fine-tunes that have this model's chain
    1, so that its prefill replicas serve them too. Clients say their names. A section has the checkpoint's `path` and,
    for its own decode replicas, what shall not be as in [decode], e.g. `replicas`, `max_replicas`, `weights`."""

    @property
    def served_name(self) -> str:
        """The name that clients say; empty without a path."""
        return self.name or ("" if self.path is None else self.path.absolute().name)


class GatewaySection(Settings):
    """Section [gateway]."""

    host: str = "127.0.0.1"
    """Address that the gateway listens on; "0.0.0.0" admits other machines by IPv4, "::" by both IP versions."""
    port: NonNegativeInt = Field(default=defaults.GATEWAY_PORT, le=65535)
    """TCP port of the gateway; 0 picks a free one."""
    http_port: NonNegativeInt | None = Field(default=None, le=65535)
    """TCP port of the same over HTTP, as OpenAI's clients speak; by default the one after `port`; 0 picks one."""
    max_files_bytes: ByteSize = ByteSize(256 << 20)
    """Documents that clients upload to /v1/files, all that are kept, in bytes or with a unit."""
    files_folder: Path | None = None
    """Folder of those documents on the gateway's machine, which `colm down` leaves as it is; by default one in Ray's
    session folder, which ends with the cluster. In /dev/shm they are kept in memory."""
    max_document_bytes: ByteSize = ByteSize(64 << 20)
    """Largest document of a request, in bytes or with a unit, e.g. "64MiB"."""
    max_upload_bytes: ByteSize = ByteSize(1 << 30)
    """Bytes of all requests' documents at once, until they are tokens; a document that brings more is refused."""
    upload_idle_s: PositiveFloat = defaults.UPLOAD_IDLE_S
    """Longest pause between two pieces of an upload, in seconds; a longer one ends the request."""
    max_requests: PositiveInt = defaults.MAX_REQUESTS
    """Requests at once inside the gateway; the next is refused."""
    default_max_new_tokens: PositiveInt = 256
    """Most tokens of an answer if the client sets no limit."""
    max_new_tokens: PositiveInt = 16384
    """Most tokens of an answer that a client may ask for."""
    default_timeout_s: PositiveFloat = 3600.0
    """Seconds that a request may take without a client's deadline, plus its work at the two speeds below."""
    min_prefill_tokens_per_s: PositiveFloat = 15.0
    """Slowest prefill, in prompt tokens/s, that such a request is given time for."""
    min_decode_tokens_per_s: PositiveFloat = 2.0
    """Slowest decoding, in new tokens/s, that such a request is given time for."""
    max_timeout_s: PositiveFloat = 24 * 3600.0
    """Longest timeout_s that a client may ask for, and longest deadline of any request, in seconds."""
    drain_s: NonNegativeFloat = defaults.DRAIN_S
    """Seconds that answers have to end when the gateway stops or is replaced; then the next one goes on with them."""
    tls_certificate: Path | None = None
    """Your own certificate for clients, e.g. Let's Encrypt's fullchain.pem; read again when it changes."""
    tls_key: Path | None = None
    """Its private key, on the gateway's machine."""
    audit_folder: Path | None = None
    """Folder of the audit log, on the gateway's machine: a line for each request, sizes only; by default none."""
    audit_keep_days: PositiveInt = 30
    """Days that the audit log is kept, today included."""

    @property
    def wanted_http_port(self) -> int:
        """The port that `http_port` stands for; 0 for a free one."""
        if self.http_port is not None:
            return self.http_port
        return (self.port + 1) % (1 << 16) if self.port else 0


_RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")

# Options of the gateway, and those that limit them.
_LIMITED = {
    "default_max_new_tokens": "max_new_tokens",
    "default_timeout_s": "max_timeout_s",
    "max_document_bytes": "max_upload_bytes",
}


class SecuritySection(Settings):
    """Section [security]."""

    token: Literal["auto", "off"] = "auto"
    """auto makes a token that clients must send, and `colm submit` on this machine finds; off admits every client."""
    tls: Literal["auto", "off"] = "auto"
    """auto makes certificates, and encrypts the gateway's and the nodes' connections; off leaves them in plaintext."""
    folder: Path | None = None
    """Folder of `colm secrets`, at the same path on every machine; with ray.address only. Else `colm up` makes one."""
    ca_certificate: Path | None = None
    """Your own authority, which signs the nodes' certificates of the folder that `colm up` makes; else it makes one."""
    ca_key: Path | None = None
    """Its private key, which stays where it is."""
    insecure: bool = False
    """Insecure: lets tls = "off" send tokens and text in plaintext between machines, not on the loopback alone."""

    @property
    def authority(self) -> tuple[Path, Path] | None:
        """Your own authority and its key; None without one."""
        return None if self.ca_certificate is None or self.ca_key is None else (self.ca_certificate, self.ca_key)


class MetricsSection(Settings):
    """Section [metrics]."""

    enabled: bool = True
    """Serve numbers to Prometheus from every process, and from the gateway the list of them, at /targets."""
    host: str = "127.0.0.1"
    """Where; an address that other machines reach has no token, and shows numbers only to whoever asks."""
    port: NonNegativeInt = Field(default=0, le=65535)
    """TCP port of the gateway's; 0 picks a free one, which `colm status` shows. The nodes' are always free ones."""


class TracingSection(Settings):
    """Section [tracing]."""

    folder: Path | None = None
    """Folder where each process records the spans of requests, at the same path on every machine; none by default."""
    share: float = Field(default=1.0, ge=0, le=1)
    """Share of the requests that are recorded; those whose client says that it records its own always are."""

    @property
    def files(self) -> TraceFiles | None:
        """What processes are told; None without a folder."""
        return None if self.folder is None else TraceFiles(folder=str(self.folder.absolute()), share=self.share)


class RaySection(Settings):
    """Section [ray]."""

    address: str | None = None
    """Running Ray cluster to join, e.g. "auto" or "10.0.0.1:6379"; by default `colm up` starts one here."""
    application: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")] = "colm"
    """Name of this cluster among those that share a joined Ray, in a-z, 0-9 and _; each also has a state directory,
    secrets and ports of its own."""
    insecure: bool = False
    """Join a Ray that demands no token: whoever reaches its ports can then run code on every machine of it."""
    ready_timeout_s: PositiveFloat = 300.0
    """Seconds that replicas may take to load before `colm up` gives up."""


class ClusterConfig(Settings):
    """All options of a cluster, section by section."""

    model: ModelSection = ModelSection()
    prefill: PrefillSection = PrefillSection()
    decode: DecodeSection = DecodeSection()
    gateway: GatewaySection = GatewaySection()
    security: SecuritySection = SecuritySection()
    metrics: MetricsSection = MetricsSection()
    tracing: TracingSection = TracingSection()
    ray: RaySection = RaySection()

    @model_validator(mode="before")
    @classmethod
    def _variants_are_whole(cls, values: Any) -> Any:
        """What a variant's section does not say is as [decode] says."""
        match values:
            case {"model": {"variants": dict(variants), **rest}}:
                decode = values.get("decode", {})
                whole = {name: _whole_variant(name, given, decode) for name, given in variants.items()}
                return values | {"model": rest | {"variants": whole}}
        return values

    @property
    def decode_pools(self) -> dict[str, DecodeSection]:
        """The sections of all models' decode pools, by variant; the model's own has none."""
        return {"": self.decode, **self.model.variants}

    @property
    def placed(self) -> dict[str, PrefillSection | DecodeSection]:
        """The sections of all that compute, by their names in the file."""
        variants = {f"model.variants.{name}": section for name, section in self.model.variants.items()}
        return {"prefill": self.prefill, "decode": self.decode, **variants}

    @property
    def pools(self) -> dict[str, PrefillSection | DecodeSection]:
        """The same by the names of their pools."""
        decode = {pool_name(Role.DECODE, variant): section for variant, section in self.decode_pools.items()}
        return {pool_name(Role.PREFILL): self.prefill, **decode}

    @property
    def num_decode_replicas(self) -> int:
        """Decode replicas of all models, at most."""
        return sum(section.most_replicas for section in self.decode_pools.values())

    @property
    def scalings(self) -> tuple[PoolScaling, ...]:
        """Of the pools whose number of replicas follows their load."""
        decode = [
            replace(scaling, variant=variant)
            for variant, section in self.decode_pools.items()
            if (scaling := section.scaling) is not None
        ]
        return (*filter(None, [self.prefill.scaling]), *decode)

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


def _whole_variant(name: str, given: Any, decode: Any) -> Any:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):  # it becomes part of names in Ray Serve, and of files'
        raise ValueError(f"model.variants: {name!r} is no name; use letters, digits, '.', '_' and '-'")
    if isinstance(given, str):
        raise ValueError(f"model.variants.{name}={given!r} must be a section: [model.variants.{name}] path = {given!r}")
    return decode | given if isinstance(given, dict) and isinstance(decode, dict) else given


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
        raise ConfigError(explain(err, str)) from err
    _check_limits(config)
    _check_scaling(config)
    _check_devices(config)
    _check_secrets(config)
    _check_certificates(config)
    return config


def _check_limits(config: ClusterConfig) -> None:
    for name, limit in _LIMITED.items():
        value, highest = getattr(config.gateway, name), getattr(config.gateway, limit)
        if value > highest:
            raise ConfigError(
                f"gateway.{name}={value} is above gateway.{limit}={highest}; lower the one or raise the other"
            )


def _check_scaling(config: ClusterConfig) -> None:
    for name, section in config.placed.items():
        if section.max_replicas is not None and section.max_replicas < section.num_replicas:
            raise ConfigError(
                f"{name}.max_replicas={section.max_replicas} is below {name}.replicas={section.replicas} and "
                f"{name}.standby={section.standby} together; raise it, or leave it out for a number that stays"
            )
        if section.scale_down_s < section.scale_up_s:
            raise ConfigError(
                f"{name}.scale_down_s={section.scale_down_s:g} is below {name}.scale_up_s={section.scale_up_s:g}; "
                "replicas would go as they came; raise the one or lower the other"
            )


def _check_devices(config: ClusterConfig) -> None:
    """Refuse Ray's own resources, a GPU that its replica would leave idle, and an attention backend without a GPU."""
    for name, section in config.placed.items():
        if section.resource in _RAYS_OWN:
            raise ConfigError(f"{name}.resource={section.resource!r} is Ray's own; name one of yours")
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


def _check_secrets(config: ClusterConfig) -> None:
    address, folder = config.ray.address, config.security.folder
    if address is not None and folder is None:
        raise ConfigError(
            f"ray.address={address!r} needs security.folder: make one with `colm secrets DIR`, copy it to the same "
            "path on every machine, and give --secrets DIR"
        )
    if address is None and folder is not None:
        raise ConfigError(
            f"security.folder={str(folder)!r} needs ray.address; a Ray that `colm up` starts has secrets of its own"
        )


def _check_certificates(config: ClusterConfig) -> None:
    """Refuse halves of pairs, certificates that nobody would use, and plaintext that leaves this machine unasked."""
    gateway, security = config.gateway, config.security
    pairs = {
        "gateway.tls_certificate": gateway.tls_certificate,
        "gateway.tls_key": gateway.tls_key,
        "security.ca_certificate": security.ca_certificate,
        "security.ca_key": security.ca_key,
    }
    for one, other in (("gateway.tls_certificate", "gateway.tls_key"), ("security.ca_certificate", "security.ca_key")):
        for given, missing in ((one, other), (other, one)):
            if pairs[given] is not None and pairs[missing] is None:
                raise ConfigError(f"{given}={str(pairs[given])!r} needs {missing}; give both, or neither")
    for name, path in pairs.items():
        if path is not None and security.tls == "off":
            raise ConfigError(f"{name}={str(path)!r} with security.tls='off' is not used; leave one of them out")
    if security.ca_certificate is not None and security.folder is not None:
        raise ConfigError(
            f"security.ca_certificate={str(security.ca_certificate)!r} with security.folder={str(security.folder)!r}: "
            "that folder has its authority already; give yours to `colm secrets --ca-certificate --ca-key`"
        )
