"""The memory behind the pages.

Shapes: B pages of the pool, P tokens of a page, K kv heads, D head dim, L layers, M pages of one layer of a request,
T tokens of a tile, R requests of a batch.
"""

from typing import Any

import numpy as np
import torch
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

    def write_tokens(self, pages_R: Tensor, slots_R: Tensor, k_RKD: Tensor, v_RKD: Tensor) -> None:
        """Store one token's keys and values of one layer for each request: page `pages_R[r]`, row `slots_R[r]`."""
        self.k_pages_BPKD[pages_R, slots_R] = k_RKD
        self.v_pages_BPKD[pages_R, slots_R] = v_RKD


def _contiguous(ids: NDArray[np.int32]) -> slice | NDArray[np.int32]:
    """A slice where pages are neighbours: numpy then copies without an index per page."""
    first, last = int(ids[0]), int(ids[-1])
    if last - first == len(ids) - 1 and bool((np.diff(ids) == 1).all()):
        return slice(first, last + 1)
    return ids
