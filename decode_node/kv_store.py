"""The memory behind the pages.

Shapes: B pages of the pool, P tokens of a page, K kv heads, D head dim, L layers, M pages of one layer of a request,
T tokens of a tile, R requests of a batch, S = B * P rows.
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
    """Keys and values of all requests, page by page."""

    def __init__(self, layout: KvLayout, num_pages: int) -> None:
        self.layout = layout
        self.num_pages = num_pages
        shape = (num_pages, layout.page_tokens, layout.num_kv_heads, layout.head_dim)
        # Untouched pages cost no memory: the system backs them when they are first written.
        self.k_pages_BPKD = torch.empty(shape, dtype=layout.dtype)
        self.v_pages_BPKD = torch.empty(shape, dtype=layout.dtype)
        self._k_cache_SKD, self._v_cache_SKD = self.k_pages_BPKD.flatten(0, 1), self.v_pages_BPKD.flatten(0, 1)
        # numpy has no bfloat16; moving bytes needs only the width.
        width = {2: torch.int16, 4: torch.int32}[layout.dtype.itemsize]
        self._numpy_dtype: np.dtype[Any] = np.dtype(f"i{layout.dtype.itemsize}")
        self._pages = [pages.view(width).numpy() for pages in (self.k_pages_BPKD, self.v_pages_BPKD)]

    def page_table(self, lease: PageLease) -> NDArray[np.int32]:
        """Divide a lease among the layers: table_LM."""
        return np.array(lease.page_ids, dtype=np.int32).reshape(self.layout.num_layers, -1)

    def write_tile(self, pages_M: NDArray[np.int32], first_token: int, num_tokens: int, payload: memoryview) -> None:
        """Copy a tile's payload (keys, then values, both (K, T, D)) into its pages.

        Args:
            pages_M: the layer's row of the page table.
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
                ids = pages_M[first_page : first_page + num_whole]
                body = tokens_TKD[:whole].reshape(num_whole, layout.page_tokens, *tokens_TKD.shape[1:])
                pages[_contiguous(ids)] = body
            if num_tokens > whole:
                pages[pages_M[first_page + num_whole], : num_tokens - whole] = tokens_TKD[whole:]

    def write_tokens(
        self, slot_mapping_R: Tensor, k_RKD: Tensor, v_RKD: Tensor, cos_RD: Tensor, sin_RD: Tensor
    ) -> None:
        """Store one token's keys, rotated on the way, and values of one layer for each request.

        Args:
            slot_mapping_R: int64, page * P + slot.
            k_RKD: unrotated.
            v_RKD: stored as they are.
            cos_RD: of `colm.model.rope.rotation`.
            sin_RD: likewise.
        """
        write_kv(k_RKD, v_RKD, cos_RD, sin_RD, self._k_cache_SKD, self._v_cache_SKD, slot_mapping_R)


def _contiguous(ids: NDArray[np.int32]) -> slice | NDArray[np.int32]:
    """A slice where pages are neighbours: numpy then copies without an index per page."""
    first, last = int(ids[0]), int(ids[-1])
    if last - first == len(ids) - 1 and bool((np.diff(ids) == 1).all()):
        return slice(first, last + 1)
    return ids
