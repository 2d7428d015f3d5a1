"""The memory of the pages: one tensor of keys and one of values.

Shapes: L layers, B pages of the pool, P tokens of a page, K kv heads, D head dim, M pages of a request, T tokens of a
tile or of a step, S = B * P rows.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from colm_kernels.kv_payload import scatter_rows
from colm_kernels.kv_quantise import write_dequantised_kv
from colm_kernels.rotary import write_kv
from numpy.typing import NDArray
from torch import Tensor

from colm.kv import KvTile
from colm.placement import CPU
from decode_node.kv_layout import KvLayout
from decode_node.page_pool import PageLease


class KvStore:
    """Keys and values of all requests, page by page. A page is P tokens of every layer, at one index in each."""

    def __init__(self, layout: KvLayout, num_pages: int, device: torch.device = CPU) -> None:
        self.layout = layout
        self.device = device
        self.num_pages = num_pages
        kv_format = layout.kv_format
        shape = (kv_format.num_layers, num_pages, layout.page_tokens, kv_format.num_kv_heads, kv_format.head_dim)
        # On the CPU untouched pages cost no memory: the system backs them when they are first written.
        self.k_pages_LBPKD = torch.empty(shape, dtype=kv_format.dtype, device=device)
        self.v_pages_LBPKD = torch.empty(shape, dtype=kv_format.dtype, device=device)
        self._k_cache_LSKD, self._v_cache_LSKD = self.k_pages_LBPKD.flatten(1, 2), self.v_pages_LBPKD.flatten(1, 2)

    def page_table(self, lease: PageLease) -> NDArray[np.int32]:
        """The lease's page ids in the order of the tokens that they hold: table_M."""
        return np.concatenate([np.arange(start, start + count, dtype=np.int32) for start, count in lease.runs])

    def write(self, table_M: NDArray[np.int32], tile: KvTile) -> None:
        """Copy a tile into its pages. It may begin and end anywhere inside them.

        Args:
            table_M: the request's page ids, from `page_table`.
            tile: in the store's format, or in int8, on the host.
        """
        runs = list(self._runs(table_M, tile.first_token, tile.num_tokens))
        if tile.scale_ZKT is not None:
            self._write_quantised(runs, tile, tile.scale_ZKT)
            return
        for cache_LSKD, tokens_KTD in zip(
            (self._k_cache_LSKD, self._v_cache_LSKD), (tile.k_KTD, tile.v_KTD), strict=True
        ):
            # On a device, the copies of all threads go to its default stream, ahead of the steps that read them.
            cache_SKD, here_KTD = cache_LSKD[tile.layer], tokens_KTD.to(self.device)
            for first, count, slot in runs:
                scatter_rows(here_KTD[:, first : first + count], cache_SKD[slot : slot + count])

    def _write_quantised(self, runs: list[tuple[int, int, int]], tile: KvTile, scale_ZKT: Tensor) -> None:
        caches = self._k_cache_LSKD[tile.layer], self._v_cache_LSKD[tile.layer]
        for cache_SKD, q_KTD, scale_KT in zip(caches, (tile.k_KTD, tile.v_KTD), scale_ZKT, strict=True):
            q_TKD, scale_TK = q_KTD.transpose(0, 1), scale_KT.t()
            for first, count, slot in runs:
                # In the calling thread alone: the others decode.
                write_dequantised_kv(
                    q_TKD[first : first + count],
                    scale_TK[first : first + count],
                    cache_SKD[slot : slot + count],
                    num_threads=1,
                )

    def _runs(self, table_M: NDArray[np.int32], first_token: int, num_tokens: int) -> Iterator[tuple[int, int, int]]:
        """Divide a tile where its pages are not neighbours: (token of the tile, count, row of the cache)."""
        page_tokens, end_token = self.layout.page_tokens, first_token + num_tokens
        first_page = first_token // page_tokens
        ids = table_M[first_page : self.layout.pages(end_token)]
        breaks = np.flatnonzero(np.diff(ids) != 1) + 1
        for start, stop in pairwise([0, *breaks.tolist(), len(ids)]):
            # [begin, end) lies in pages ids[start] .. ids[stop - 1], which follow each other.
            begin = max((first_page + start) * page_tokens, first_token)
            end = min((first_page + stop) * page_tokens, end_token)
            yield begin - first_token, end - begin, int(ids[start]) * page_tokens + begin % page_tokens

    def write_tokens(
        self, layer: int, slot_mapping_T: Tensor, k_TKD: Tensor, v_TKD: Tensor, cos_TD: Tensor, sin_TD: Tensor
    ) -> None:
        """Store a step's tokens in one layer: their keys, rotated on the way, and values.

        Args:
            layer: the layer to write.
            slot_mapping_T: int64, page * P + slot.
            k_TKD: unrotated.
            v_TKD: stored as they are.
            cos_TD: of `colm.model.rope.rotation`.
            sin_TD: likewise.
        """
        k_cache_SKD, v_cache_SKD = self._k_cache_LSKD[layer], self._v_cache_LSKD[layer]
        write_kv(k_TKD, v_TKD, cos_TD, sin_TD, k_cache_SKD, v_cache_SKD, slot_mapping_T)
