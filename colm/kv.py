"""Keys and values as they travel and rest: dtype, shape, bytes, and the fingerprint both ends must agree on.

Shapes: K kv heads, T tokens of a tile, D head dim.
"""

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from colm.checkpoint import Checkpoint, backbone_digest
from colm.dtypes import dtype_name
from colm.errors import ConfigError, UnsupportedModel
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
class KvLayout:
    """What one cached token is made of."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    page_tokens: int
    """Tokens in one page, all layers of them."""

    @classmethod
    def of(cls, config: ChainConfig, *, dtype: torch.dtype, page_tokens: int) -> "KvLayout":
        """The layout of a model's cache."""
        if page_tokens < 1:
            raise ValueError(f"page_tokens={page_tokens} must be at least 1")
        return cls(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
            page_tokens=page_tokens,
        )

    @property
    def layer_token_bytes(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return self.num_layers * self.layer_token_bytes

    @property
    def page_bytes(self) -> int:
        """Keys and values of one page, all layers."""
        return self.page_tokens * self.token_bytes

    def pages_within(self, kv_cache_bytes: int) -> int:
        """Pages that a cache of that size holds.

        Raises:
            ConfigError: it holds none.
        """
        num_pages = kv_cache_bytes // self.page_bytes
        if num_pages < 1:
            raise ConfigError(
                f"decode.kv_cache_bytes={kv_cache_bytes} bytes holds no page; the least is one page of "
                f"{self.page_tokens} tokens in all {self.num_layers} layers, {self.page_bytes} bytes"
            )
        return num_pages

    def pages(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_tokens)


@dataclass(frozen=True, slots=True)
class KvTile:
    """Keys and values of one layer for a run of consecutive tokens."""

    layer: int
    first_token: int
    k_KTD: Tensor
    v_KTD: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens in the tile."""
        return self.k_KTD.shape[1]


def fingerprint(checkpoint: Checkpoint, layout: KvLayout) -> str:
    """SHA-256 over chain 1's backbone, rope, head layout, KV dtype and page size, in hex.

    Equal fingerprints mean that either end may read the other's keys and values. Later chains, the final norm
    and the head do not enter: one prefill pool serves every model that shares chain 1.
    """
    config = checkpoint.config
    scaling = config.rope_scaling
    facts = {
        "backbone": backbone_digest(checkpoint),
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else repr(scaling),
        "norm_eps": config.norm_eps,
        "num_layers": layout.num_layers,
        "num_kv_heads": layout.num_kv_heads,
        "head_dim": layout.head_dim,
        "chain1_heads": config.chains[0],
        "dtype": dtype_name(layout.dtype),
        "page_tokens": layout.page_tokens,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
