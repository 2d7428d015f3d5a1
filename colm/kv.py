"""Keys and values on the wire and in pages: the format and the fingerprint that both ends must agree on.

Shapes: K kv heads, T tokens of a tile, D head dim, Z the two of keys and values.
"""

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from colm.checkpoint import Checkpoint, backbone_digest, prefill_tensor_names
from colm.dtypes import dtype_name
from colm.errors import UnsupportedModel
from colm.model.config import ChainConfig


def require_shared_kv(config: ChainConfig) -> None:
    """Refuse a model whose keys and values do not all come from chain 1: prefill could not compute them.

    Raises:
        UnsupportedModel: names the option and the way out.
    """
    if config.num_chains > 1 and not config.kv_sharing:
        raise UnsupportedModel(
            f"kv_sharing=False with chains={config.chains} cannot be served: later chains have keys and values of "
            "their own; serve a model with KV sharing, or one chain of this one: `colm slice SRC DEST --chains 1`"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class KvFormat:
    """What one token's keys and values are made of; both ends of a stream have the same."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: ChainConfig, dtype: torch.dtype) -> "KvFormat":
        """The format of a model's keys and values."""
        return cls(
            num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, dtype=dtype
        )

    @property
    def layer_token_bytes(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return self.num_layers * self.layer_token_bytes


@dataclass(frozen=True, slots=True)
class KvTile:
    """Keys and values of one layer for a run of consecutive tokens."""

    layer: int
    first_token: int
    k_KTD: Tensor
    v_KTD: Tensor
    scale_ZKT: Tensor | None = None
    """Where keys and values are int8: the bf16 number that each token's and head's are multiples of, keys' first."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the tile."""
        return self.k_KTD.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of, in the order of the wire."""
        both = self.k_KTD, self.v_KTD
        return both if self.scale_ZKT is None else (*both, self.scale_ZKT)

    def part(self, start: int, stop: int) -> "KvTile":
        """Its tokens [start, stop), as views."""
        return KvTile(
            self.layer,
            self.first_token + start,
            self.k_KTD[:, start:stop],
            self.v_KTD[:, start:stop],
            None if self.scale_ZKT is None else self.scale_ZKT[:, :, start:stop],
        )


def fingerprint(checkpoint: Checkpoint, kv_format: KvFormat) -> str:
    """SHA-256 over chain 1's backbone, rope, head layout and KV dtype, in hex.

    Equal fingerprints mean that either end may read the other's keys and values. Later chains, the final norm
    and the head do not enter: one prefill pool serves every model that shares chain 1.
    """
    config = checkpoint.config
    scaling = config.rope_scaling
    facts = {
        "backbone": backbone_digest(checkpoint),
        # The stored digest does not change when somebody edits the config, but other tensors may then be read.
        "tensors": sorted(prefill_tensor_names(config)),
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else repr(scaling),
        "norm_eps": config.norm_eps,
        "num_layers": kv_format.num_layers,
        "num_kv_heads": kv_format.num_kv_heads,
        "head_dim": kv_format.head_dim,
        "chain1_heads": config.chains[0],
        "dtype": dtype_name(kv_format.dtype),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
