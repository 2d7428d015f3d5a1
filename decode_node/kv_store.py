"""The memory of the pages: one tensor of keys and one of values, and of int8 pages their scales.

Shapes: L layers, B pages of the pool, P tokens of a page, K kv heads, D head dim, M pages of a request, T tokens of a
tile or of a step, S = B * P rows.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
import torch
import xxhash
from colm_kernels.kv_payload import store_payload
from colm_kernels.rotary import rotate_, write_kv
from numpy.typing import NDArray
from torch import Tensor

from colm.huge_pages import empty_side_by_side
from colm.kv import KvTile
from colm.kv_position import KvPosition
from colm.placement import CPU
from colm.request import KvCodec
from colm.wire.kv_codec import read_payload
from decode_node.kv_layout import KvLayout
from decode_node.kv_rows import KvRows
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
        self.k_pages_LBPKD, self.v_pages_LBPKD = _two_empty(torch.Size(shape), layout.dtype, device)
        self.k_scales_LBPK = self.v_scales_LBPK = None
        if layout.cache_dtype == "int8":
            self.k_scales_LBPK, self.v_scales_LBPK = _two_empty(torch.Size(shape[:-1]), torch.bfloat16, device)
        self._k_rows = _layers(self.k_pages_LBPKD, self.k_scales_LBPK)
        self._v_rows = _layers(self.v_pages_LBPKD, self.v_scales_LBPK)

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
        caches, scales = (self._k_rows[tile.layer], self._v_rows[tile.layer]), tile.scale_ZKT
        for index, (cache, tokens_KTD) in enumerate(zip(caches, (tile.k_KTD, tile.v_KTD), strict=True)):
            # int8 is widened on the host, if it is at all.
            here_KTD = tokens_KTD.to(self.device) if scales is None else tokens_KTD
            for first, count, slot in runs:
                part = slice(first, first + count)
                # On a device, the copies of all threads go to its default stream, ahead of the steps that read them.
                cache.write_run(slot, here_KTD[:, part], None if scales is None else scales[index, :, part])

    def read(self, table_M: NDArray[np.int32], layer: int, first_token: int, num_tokens: int) -> KvTile:
        """A tile copied out of its pages onto the host, in the calling thread alone; of pages in the model's dtype."""
        rows = [slice(slot, slot + count) for _, count, slot in self._runs(table_M, first_token, num_tokens)]
        k_KTD, v_KTD = (_gathered(of_layer[layer].rows_SKD, rows) for of_layer in (self._k_rows, self._v_rows))
        return KvTile(layer, first_token, k_KTD, v_KTD)

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page, in all layers. What is written into it meanwhile may or may not be in the copy."""
        for of_pages in (self.k_pages_LBPKD, self.v_pages_LBPKD, self.k_scales_LBPK, self.v_scales_LBPK):
            if of_pages is not None:
                of_pages[:, target] = of_pages[:, source]

    def write_payload(
        self,
        table_M: NDArray[np.int32],
        place: KvPosition,
        num_tokens: int,
        payload: memoryview,
        codec: KvCodec,
        *,
        is_shared: bool,
    ) -> int:
        """Copy a tile's payload into its pages; where both have one dtype, in one pass over it.

        Args:
            table_M: the request's page ids, from `page_table`.
            place: the tile's layer and first token.
            num_tokens: of the tile.
            payload: as long as the tile's is, in the codec.
            codec: of the payload.
            is_shared: somebody else may write to it meanwhile.

        Returns:
            XXH3-64 of what was copied.
        """
        keys, values = self._k_rows[place.layer], self._v_rows[place.layer]
        if codec == "raw" and keys.scales_SK is None:
            runs = [(count, slot) for _, count, slot in self._runs(table_M, place.token, num_tokens)]
            whole = torch.frombuffer(payload, dtype=torch.uint8)
            if (checksum := store_payload(whole, keys.rows_SKD, values.rows_SKD, runs)) is not None:
                return checksum
        held = memoryview(bytes(payload)) if is_shared else payload
        self.write(
            table_M,
            read_payload(
                held,
                codec,
                self.layout.kv_format,
                layer=place.layer,
                first_token=place.token,
                num_tokens=num_tokens,
            ),
        )
        return xxhash.xxh3_64_intdigest(held)

    def _runs(self, table_M: NDArray[np.int32], first_token: int, num_tokens: int) -> Iterator[tuple[int, int, int]]:
        """Divide a tile where its pages are not neighbours: (token of the tile, count, row of the cache)."""
        page_tokens, end_token = self.layout.page_tokens, first_token + num_tokens
        first_page = first_token // page_tokens
        ids = table_M[first_page : self.layout.pages(end_token)]
        breaks = np.flatnonzero(ids[1:] - ids[:-1] != 1) + 1
        for start, stop in pairwise((0, *breaks.tolist(), len(ids))):
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
            k_TKD: unrotated; rotated in place where pages are int8.
            v_TKD: stored as they are.
            cos_TD: of `colm.model.rope.rotation`.
            sin_TD: likewise.
        """
        keys, values = self._k_rows[layer], self._v_rows[layer]
        if keys.scales_SK is None:
            write_kv(k_TKD, v_TKD, cos_TD, sin_TD, keys.rows_SKD, values.rows_SKD, slot_mapping_T)
        else:
            keys.write_tokens(slot_mapping_T, rotate_(k_TKD, cos_TD, sin_TD))
            values.write_tokens(slot_mapping_T, v_TKD)


def _gathered(rows_SKD: Tensor, slices: Iterable[slice]) -> Tensor:
    """Rows as a tile's tensor: x_KTD, contiguous."""
    # NumPy knows no bfloat16; PyTorch would copy with all threads.
    as_ints = {2: torch.int16, 4: torch.int32}[rows_SKD.element_size()]
    parts = [rows_SKD[rows].cpu().view(as_ints).numpy().swapaxes(0, 1) for rows in slices]
    return torch.from_numpy(np.concatenate(parts, axis=1)).view(rows_SKD.dtype)


def _two_empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Iterable[Tensor]:
    if device.type != "cpu":
        return [torch.empty(shape, dtype=dtype, device=device) for _ in range(2)]
    return empty_side_by_side({"keys": shape, "values": shape}, dtype).values()


def _layers(pages_LBPKD: Tensor, scales_LBPK: Tensor | None) -> list[KvRows]:
    rows_LSKD = pages_LBPKD.flatten(1, 2)
    if scales_LBPK is None:
        return [KvRows(rows_SKD, None) for rows_SKD in rows_LSKD]
    return [KvRows(*of_layer) for of_layer in zip(rows_LSKD, scales_LBPK.flatten(1, 2), strict=True)]
