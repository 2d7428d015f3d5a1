"""The pages in which a decode node keeps keys and values; no other node knows of them."""

from dataclasses import dataclass

from colm.errors import ConfigError
from colm.kv import KvFormat


@dataclass(frozen=True, slots=True)
class KvLayout:
    """A KV format, divided into pages of `page_tokens` tokens."""

    kv_format: KvFormat
    page_tokens: int
    """Tokens in one page; a page holds all their layers."""

    def __post_init__(self) -> None:
        if self.page_tokens < 1:
            raise ValueError(f"page_tokens={self.page_tokens} must be at least 1")

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: keys and values of all layers."""
        return self.page_tokens * self.kv_format.token_bytes

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
