"""What `colm up` may change of a cluster that is up, and what it would change."""

from pathlib import Path
from typing import Any

import psutil
from pydantic import ByteSize

from cluster.options import ClusterConfig, DecodeSection, VariantSection
from colm.checkpoint import Checkpoint
from colm.errors import ClusterError, ConfigError

_FIXED_SECTIONS = ("security",)
_FIXED = (
    "ray.address",
    "ray.application",
    "ray.insecure",
    "gateway.host",
    "gateway.tls_certificate",
    "gateway.tls_key",
)
"""Options that replicas in turn cannot take on: clients, files and the other replicas rely on them."""
_PORTS = ("gateway.port", "gateway.http_port")


_REPLICA_BYTES = 1 << 30
"""Of a replica besides its weights: Python, PyTorch, the work of a tile. Weights may be stored in half the width."""


def as_kept(config: ClusterConfig) -> dict[str, Any]:
    """The options as the state file keeps them."""
    known = {
        "path": _whole(config.model.path),
        "name": config.model.served_name,
        "variants": {
            name: section.model_copy(update={"path": section.path.resolve()})
            for name, section in config.model.variants.items()
        },
    }
    kept = config.model_copy(update={"model": config.model.model_copy(update=known)})
    return kept.model_dump(mode="json")


def changed(kept: dict[str, Any], config: ClusterConfig) -> dict[str, tuple[Any, Any]]:
    """Options that differ from those of the running cluster: (what it has, what is wanted), by dotted name.

    A variant that comes or goes is its path alone.
    """
    wanted = as_kept(config)
    known = [set(options["model"].get("variants", {})) for options in (kept, wanted)]
    has, wants = (_by_name(options, known[0] & known[1]) for options in (kept, wanted))
    pairs = {name: (has.get(name), wants.get(name)) for name in wants | has}
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


def weights_stamps(config: ClusterConfig, checkpoint: Checkpoint) -> dict[str, str]:
    """Those of all models' weights, by their files."""
    variants = (Checkpoint.open(section.path) for section in config.model.variants.values())
    files = (each.weights_path.resolve() for each in (checkpoint, *variants))
    return {str(path): weights_stamp(path) for path in files}


def require_same_weights(known: dict[str, str], config: ClusterConfig, checkpoint: Checkpoint) -> None:
    """Refuse weights that were written anew since a running cluster read them.

    Args:
        known: stamps of what it read.
        config: what is wanted.
        checkpoint: of the model itself.

    Raises:
        ClusterError: names the file and the way out.
    """
    for path, stamp in weights_stamps(config, checkpoint).items():
        if known.get(path, stamp) != stamp:
            raise ClusterError(
                f"{path} was written anew since this cluster read it, and answers that run cannot go on "
                "with other weights; write a new checkpoint beside it and name that, or run `colm down` first"
            )


def is_another_model(before: ClusterConfig, config: ClusterConfig) -> bool:
    """Whether the other options are of another model: no answer of the one could go on at replicas of the other.

    A variant that comes or goes is none, but one of another checkpoint has a pool of the same name.
    """
    paths = [_paths(each) for each in (before, config)]
    is_same = all(paths[0][name] == paths[1][name] for name in paths[0].keys() & paths[1].keys())
    return not is_same or before.resolved_dtype != config.resolved_dtype


def _paths(config: ClusterConfig) -> dict[str, Path | None]:
    """Of all models, by variant."""
    further = {variant: section.path.resolve() for variant, section in config.model.variants.items()}
    return {"": _whole(config.model.path), **further}


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
    needed = 0
    for section in config.placed.values():
        if section.resolved_device == "cpu":
            of_pool = Checkpoint.open(section.path).weights_path if isinstance(section, VariantSection) else weights
            pages = section.kv_cache_bytes if isinstance(section, DecodeSection) else 0
            needed += section.most_replicas * (2 * of_pool.stat().st_size + _REPLICA_BYTES + pages)
    return needed


def _at(options: dict[str, Any], name: str) -> Any:
    section, _, option = name.partition(".")
    return options.get(section, {}).get(option)


def _by_name(options: dict[str, Any], in_both: set[str]) -> dict[str, Any]:
    """Every option by its dotted name; of variants that are not in both, their paths."""
    found: dict[str, Any] = {}
    for section, given in options.items():
        found |= {f"{section}.{name}": value for name, value in given.items()}
    for variant, given in found.pop("model.variants", {}).items():
        told = given if variant in in_both else {"path": given["path"]}
        found |= {f"model.variants.{variant}.{name}": value for name, value in told.items()}
    return found


def _whole(path: Path | None) -> Path | None:
    return None if path is None else path.resolve()
