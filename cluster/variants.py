"""Further models of a cluster: they have its model's chain 1, so its prefill nodes' keys and values are theirs too."""

from cluster.options import ClusterConfig
from colm.checkpoint import Checkpoint
from colm.dtypes import parse_dtype
from colm.errors import ConfigError
from colm.kv import KvFormat, fingerprint


def require_one_chain_1(config: ClusterConfig, checkpoint: Checkpoint) -> None:
    """Refuse a variant that has not the model's name for itself, or another chain 1; the nodes would refuse that too.

    Raises:
        CheckpointError: a variant's files are damaged.
        ConfigError: names the option and the way out.
    """
    dtype = parse_dtype(config.resolved_dtype)

    def of(model: Checkpoint) -> str:
        return fingerprint(model, KvFormat.of(model.config, dtype))

    for name, section in config.model.variants.items():
        if name == config.model.served_name:
            raise ConfigError(f"model.variants: {name!r} is no name of its own; choose one that clients can tell apart")
        if (has := of(Checkpoint.open(section.path))) != (wants := of(checkpoint)):
            raise ConfigError(
                f"model.variants.{name}.path={str(section.path)!r} has another chain 1 than {checkpoint.path} "
                f"(KV fingerprint {has[:12]}, not {wants[:12]}), and its prefill replicas hold that alone; "
                "a model of another chain 1 needs a cluster of its own"
            )
