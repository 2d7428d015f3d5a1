"""Divides prompts into the blocks whose pages requests may share, and names them."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from colm.prefix import block_digests, root_digest
from colm.request import AttentionMode, KvCodec
from decode_node.kv_layout import KvLayout
from decode_node.prefix_cache import PagesWanted


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptBlocks:
    """The blocks of prompts that one node reads.

    A block is what a prefill node computes by itself, tiles, in whole pages. So tokens have the same bits in a shared
    page as in one that was brought for them alone: sums of other numbers of rows would round differently. The last
    block is shorter, and only the same prompt has it.
    """

    layout: KvLayout
    fingerprint: str
    """`colm.kv.fingerprint`, of chain 1: every scale reads the same pages."""

    def tokens_each(self, tile_tokens: int) -> int:
        """Tokens of a block, of a prefill node that computes tiles of so many."""
        return math.lcm(tile_tokens, self.layout.page_tokens)

    def wanted(
        self,
        token_ids: NDArray[np.int64],
        *,
        num_tokens: int,
        tile_tokens: int,
        attention: AttentionMode,
        codec: KvCodec,
        cache_salt: bytes,
    ) -> PagesWanted:
        """The pages of a request.

        Args:
            token_ids: the part of its prompt that a prefill node computes; at least one token.
            num_tokens: of its whole prompt and answer.
            tile_tokens: of the prefill node's tiles.
            attention: sparse plans depend on a whole prompt, which is then one block.
            codec: of the stream that brings them.
            cache_salt: prompts of other salts share nothing.
        """
        layout = self.layout
        block_tokens = self.tokens_each(tile_tokens) if attention == "dense" else len(token_ids)
        pages = self.fingerprint, layout.page_format, layout.page_tokens
        root = root_digest(*pages, tile_tokens, attention, codec, cache_salt.hex())
        ends = [*range(block_tokens, len(token_ids), block_tokens), len(token_ids)]
        starts = [0, *ends[:-1]]
        return PagesWanted(
            num_pages=layout.pages(num_tokens),
            keys=tuple(block_digests(root, token_ids, block_tokens)),
            sizes=tuple((end - start) // layout.page_tokens for start, end in zip(starts, ends, strict=True)),
            has_stub=len(token_ids) % layout.page_tokens > 0,
        )
