"""The pages in which a decode node keeps keys and values; no other node knows of them."""

from dataclasses import dataclass

import torch

from colm.dtypes import dtype_name
from colm.errors import ConfigError
from colm.kv import KvFormat
from colm.wire.kv_codec import wire_token_bytes
from decode_node.settings import KvCacheDtype


@dataclass(frozen=True, slots=True)
class KvLayout:
    """A KV format, divided into pages of `page_tokens` tokens."""

    kv_format: KvFormat
    page_tokens: int
    """Tokens in one page; a page holds all their layers."""
    cache_dtype: KvCacheDtype = "model"

    def __post_init__(self) -> None:
        if self.page_tokens < 1:
            raise ValueError(f"page_tokens={self.page_tokens} must be at least 1")

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values in a page."""
        return torch.int8 if self.cache_dtype == "int8" else self.kv_format.dtype

    @property
    def page_format(self) -> str:
        """Name of what a page's bytes are. Pages of equal tokens may stand for each other only where it is equal."""
        return dtype_name(self.dtype)

    @property
    def layer_token_bytes(self) -> int:
        """Keys and values of one token in one layer, scales included: in int8 what the stream's codec makes of them."""
        return wire_token_bytes(self.kv_format, "int8" if self.cache_dtype == "int8" else "raw")

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: keys and values of all layers."""
        return self.page_tokens * self.kv_format.num_layers * self.layer_token_bytes

    def pages(self, num_tokens: int) -> int:
        """Number of pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_tokens)

    def pages_within(self, kv_cache_bytes: int) -> int:
        """Number of pages that a cache of `kv_cache_bytes` bytes holds.

        Raises:
            ConfigError: it holds none.
        """
        num_pages = kv_cache_bytes // self.page_bytes
        if num_pages < 1:
            raise ConfigError(
                f"decode.kv_cache_bytes={kv_cache_bytes} bytes holds no page; the least is one page of "
                f"{self.page_tokens} tokens in all {self.kv_format.num_layers} layers, {self.page_bytes} bytes"
            )
        return num_pages
