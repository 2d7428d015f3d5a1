"""What `colm up` may change of a cluster that is up, and what it would change."""

from pathlib import Path
from typing import Any

import psutil
from pydantic import ByteSize

from cluster.options import ClusterConfig
from colm.errors import ConfigError

_FIXED_SECTIONS = ("security",)
_FIXED = ("ray.address", "ray.insecure", "gateway.host", "gateway.tls_certificate", "gateway.tls_key")
"""Options that replicas in turn cannot take on: clients, files and the other replicas rely on them."""
_PORTS = ("gateway.port", "gateway.http_port")


_REPLICA_BYTES = 1 << 30
"""Of a replica besides its weights: Python, PyTorch, the work of a tile. Weights may be stored in half the width."""


def as_kept(config: ClusterConfig) -> dict[str, Any]:
    """The options as the state file keeps them."""
    known = {
        "path": _whole(config.model.path),
        "name": config.model.served_name,
        "variants": {name: path.resolve() for name, path in config.model.variants.items()},
    }
    kept = config.model_copy(update={"model": config.model.model_copy(update=known)})
    return kept.model_dump(mode="json")


def changed(kept: dict[str, Any], config: ClusterConfig) -> dict[str, tuple[Any, Any]]:
    """Options that differ from those of the running cluster: (what it has, what is wanted), by dotted name."""
    wanted = as_kept(config)
    names = [f"{section}.{name}" for section, options in wanted.items() for name in options]
    pairs = {name: (_at(kept, name), _at(wanted, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def require_changeable(changes: dict[str, tuple[Any, Any]]) -> None:
    """Refuse what cannot change while the cluster is up.

    Raises:
        ConfigError: names the option, both values and the way out.
    """
    for name, (has, wants) in changes.items():
        if name.partition(".")[0] in _FIXED_SECTIONS or name in _FIXED or name in _PORTS:
            raise ConfigError(
                f"{name}={wants!r}: a cluster is up with {has!r}, and this cannot change under it; "
                "run `colm down` first, or leave it as it is"
            )


def with_its_ports(config: ClusterConfig, kept: dict[str, Any]) -> ClusterConfig:
    """The same with the ports that a running gateway has, where it is left to us which."""
    gateway = config.gateway
    wanted = {"port": gateway.port, "http_port": gateway.wanted_http_port}
    ports = {name: port or _at(kept, f"gateway.{name}") for name, port in wanted.items()}
    return config.model_copy(update={"gateway": gateway.model_copy(update=ports)})


def weights_stamp(path: Path) -> str:
    """What changes when a checkpoint's weights are written anew."""
    found = path.stat()
    return f"{found.st_size}.{found.st_mtime_ns}"


def is_another_model(before: ClusterConfig, config: ClusterConfig) -> bool:
    """Whether the other options are of another model: no answer of the one could go on at replicas of the other.

    A further variant is none, but one that goes or changes has answers too.
    """
    paths = {_whole(each.model.path) for each in (before, config)}
    kept, wanted = (as_kept(each)["model"]["variants"] for each in (before, config))
    return len(paths) > 1 or before.resolved_dtype != config.resolved_dtype or not kept.items() <= wanted.items()


def has_room_for_both(config: ClusterConfig, weights: Path) -> bool:
    """Whether the next replicas may start beside those that run: on this machine's CPUs alone, in the memory left."""
    if config.ray.address is not None or any(section.resolved_device != "cpu" for section in config.placed.values()):
        return False
    return _needed_bytes(config, weights) < psutil.virtual_memory().available


def require_room_for_both(config: ClusterConfig, weights: Path) -> None:
    """Refuse another model that has no room beside the one that runs; what a joined Ray has, only Ray can tell.

    Raises:
        ConfigError: says how much there is, how much is needed, and the way out.
    """
    if config.ray.address is not None:
        return
    for name, section in config.placed.items():
        if section.resolved_device != "cpu" and not section.num_gpus:
            raise ConfigError(
                f"{name}.device={section.device!r} with {name}.num_gpus=0 shares a GPU, and nobody has counted the "
                "memory that another model would find there beside the one that runs; run `colm down` first"
            )
    if (needed := _needed_bytes(config, weights)) >= (free := psutil.virtual_memory().available):
        raise ConfigError(
            f"another model beside the one that runs takes up to {ByteSize(needed).human_readable()}, and this machine "
            f"has {ByteSize(free).human_readable()} left; lower decode.kv_cache_bytes="
            f"{config.decode.kv_cache_bytes.human_readable()} or the replicas, or run `colm down` first"
        )


def _needed_bytes(config: ClusterConfig, weights: Path) -> int:
    """Memory of all replicas that compute on the CPU, at most."""
    on_cpu = [section for section in config.placed.values() if section.resolved_device == "cpu"]
    num_decode = config.num_decode_replicas if config.decode in on_cpu else 0
    num_replicas = num_decode + (config.prefill.most_replicas if config.prefill in on_cpu else 0)
    pages = num_decode * config.decode.kv_cache_bytes
    return num_replicas * (2 * weights.stat().st_size + _REPLICA_BYTES) + pages


def _at(options: dict[str, Any], name: str) -> Any:
    section, _, option = name.partition(".")
    return options.get(section, {}).get(option)


def _whole(path: Path | None) -> Path | None:
    return None if path is None else path.resolve()
