"""The memory behind the pages.

Shapes: L layers, B pages of the pool, P tokens of a page, K kv heads, D head dim, M pages of a request, T tokens of a
tile, R requests of a batch, S = B * P rows.
"""

from typing import Any

import numpy as np
import torch
from colm_kernels.rotary import write_kv
from numpy.typing import NDArray
from torch import Tensor

from colm.kv import KvLayout
from decode_node.page_pool import PageLease


class KvStore:
    """Keys and values of all requests, page by page. A page is P tokens of every layer, at one index in each."""

    def __init__(self, layout: KvLayout, num_pages: int) -> None:
        self.layout = layout
        self.num_pages = num_pages
        shape = (layout.num_layers, num_pages, layout.page_tokens, layout.num_kv_heads, layout.head_dim)
        # Untouched pages cost no memory: the system backs them when they are first written.
        self.k_pages_LBPKD = torch.empty(shape, dtype=layout.dtype)
        self.v_pages_LBPKD = torch.empty(shape, dtype=layout.dtype)
        self._k_cache_LSKD, self._v_cache_LSKD = self.k_pages_LBPKD.flatten(1, 2), self.v_pages_LBPKD.flatten(1, 2)
        # numpy has no bfloat16; moving bytes needs only the width.
        width = {2: torch.int16, 4: torch.int32}[layout.dtype.itemsize]
        self._numpy_dtype: np.dtype[Any] = np.dtype(f"i{layout.dtype.itemsize}")
        self._pages = [pages.view(width).numpy() for pages in (self.k_pages_LBPKD, self.v_pages_LBPKD)]

    def page_table(self, lease: PageLease) -> NDArray[np.int32]:
        """The lease's page ids in the order of the tokens that they hold: table_M."""
        return np.concatenate([np.arange(start, start + count, dtype=np.int32) for start, count in lease.runs])

    def write_tile(
        self, table_M: NDArray[np.int32], layer: int, first_token: int, num_tokens: int, payload: memoryview
    ) -> None:
        """Copy a tile's payload (keys, then values, both (K, T, D)) into its pages.

        Args:
            table_M: of `page_table`.
            layer: where the tile belongs.
            first_token: a multiple of the page.
            num_tokens: T; anything up to the end of the table.
            payload: as it came off the wire; its length must fit.
        """
        layout = self.layout
        shape = (2, layout.num_kv_heads, num_tokens, layout.head_dim)
        tile = np.frombuffer(payload, dtype=self._numpy_dtype).reshape(shape).transpose(0, 2, 1, 3)
        first_page = first_token // layout.page_tokens
        num_whole = num_tokens // layout.page_tokens
        whole = num_whole * layout.page_tokens
        for pages, tokens_TKD in zip(self._pages, tile, strict=True):
            if num_whole:
                ids = table_M[first_page : first_page + num_whole]
                body = tokens_TKD[:whole].reshape(num_whole, layout.page_tokens, *tokens_TKD.shape[1:])
                pages[layer][_contiguous(ids)] = body
            if num_tokens > whole:
                pages[layer, table_M[first_page + num_whole], : num_tokens - whole] = tokens_TKD[whole:]

    def write_tokens(
        self, layer: int, slot_mapping_R: Tensor, k_RKD: Tensor, v_RKD: Tensor, cos_RD: Tensor, sin_RD: Tensor
    ) -> None:
        """Store one token's keys, rotated on the way, and values of one layer for each request.

        Args:
            layer: which one.
            slot_mapping_R: int64, page * P + slot.
            k_RKD: unrotated.
            v_RKD: stored as they are.
            cos_RD: of `colm.model.rope.rotation`.
            sin_RD: likewise.
        """
        k_cache_SKD, v_cache_SKD = self._k_cache_LSKD[layer], self._v_cache_LSKD[layer]
        write_kv(k_RKD, v_RKD, cos_RD, sin_RD, k_cache_SKD, v_cache_SKD, slot_mapping_R)


def _contiguous(ids: NDArray[np.int32]) -> slice | NDArray[np.int32]:
    """A slice where pages are neighbours: numpy then copies without an index per page."""
    first, last = int(ids[0]), int(ids[-1])
    if last - first == len(ids) - 1 and bool((np.diff(ids) == 1).all()):
        return slice(first, last + 1)
    return ids
