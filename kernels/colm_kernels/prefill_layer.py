"""Half a layer of a prefill of few rows in one call of the library, by chain 1 of a gated model.

Like `decode_step`, it is the sequence of operations that a model's own modules run, and gives the same bits.

Shapes: R rows of a tile, D chain-1 model features, K kv heads, N prompt tokens, E head dim.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from colm_kernels import native
from colm_kernels.decode_step import StepArgs, StepLayer, StepTable
from colm_kernels.few_rows_linear import library_variant
from colm_kernels.native import HEAD_DIMS, CancelFlag, Variant

_MATRIX_BYTES: Final = 7 * 5 * 8
_NORM_BYTES: Final = 2 * 2 * 8
"""Of one layer in `StepTable`: matrices of 5 words, gains of 2."""


class PrefillLayerArgs(ctypes.Structure):
    """`PrefillLayerArgs` of abi.h."""

    _fields_ = (
        ("step", StepArgs),
        *((name, ctypes.c_int64) for name in ("k", "v", "delta", "first_token", "num_keys", "flag")),
    )


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """A tile's rows, and the keys and values of its prompt in one layer."""

    cos_RE: Tensor
    sin_RE: Tensor
    k_KNE: Tensor
    """Rotated keys, contiguous; the tile's are written, and read with those before them."""
    v_KNE: Tensor
    first_token: int
    cancelled: CancelFlag | None = None


class PrefillLayers:
    """The weights of chain 1, ready for the library.

    Args:
        layers: contiguous tensors of one dtype on the CPU; they must not move as long as this object lives.
        num_heads: query heads of chain 1.
        num_kv_heads: kv heads.
        head_dim: of all heads.
        eps: of the norms.
    """

    def __init__(
        self, layers: Sequence[StepLayer], *, num_heads: int, num_kv_heads: int, head_dim: int, eps: float
    ) -> None:
        self._table = StepTable(layers, [], [num_heads])
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._eps = eps

    def variant_for(self, num_rows: int) -> Variant:
        """The variant that runs so many rows; "torch" where the library cannot or is not faster."""
        return library_variant(num_rows, self._table.dtype) if self._head_dim in HEAD_DIMS else "torch"

    def write_keys_values(self, index: int, x_RD: Tensor, tile: PrefillTile, variant: Variant) -> Tensor:
        """Write the tile's keys and values of a layer.

        Args:
            index: of the layer.
            x_RD: the residual stream, contiguous.
            tile: whose rows they are.
            variant: of `variant_for`.

        Returns:
            normed_RD: x after the layer's norm before attention.

        Raises:
            ValueError: the tile's keys have no room for the rows.
        """
        normed_RD = torch.empty_like(x_RD)
        self._call("colm_prefill_keys_values", index, x_RD, normed_RD, None, tile, variant)
        return normed_RD

    def attend(self, index: int, x_RD: Tensor, normed_RD: Tensor, tile: PrefillTile, variant: Variant) -> Tensor:
        """Run the rest of the layer, once the keys and values up to the tile's end are there.

        Args:
            index: of the layer.
            x_RD: contiguous; the attention's part is added in place.
            normed_RD: of `write_keys_values`.
            tile: likewise.
            variant: likewise.

        Returns:
            delta_RD: the feed-forward's part, still to be added to x.

        Raises:
            Cancelled: the tile's flag was set.
            ValueError: as from `write_keys_values`.
        """
        delta_RD = torch.empty_like(x_RD)
        self._call("colm_prefill_attend", index, x_RD, normed_RD, delta_RD, tile, variant)
        return delta_RD

    def _call(
        self,
        function: str,
        index: int,
        x_RD: Tensor,
        normed_RD: Tensor,
        delta_RD: Tensor | None,
        tile: PrefillTile,
        variant: Variant,
    ) -> None:
        table, num_rows, num_keys = self._table, len(x_RD), tile.k_KNE.shape[1]
        if not 0 <= tile.first_token <= num_keys - num_rows:
            raise ValueError(f"{num_rows} rows from {tile.first_token} on do not lie in the {num_keys} of k_KNE")
        chain_rows = ctypes.c_int64(num_rows)
        step = StepArgs(
            matrices=ctypes.addressof(table.matrices) + index * _MATRIX_BYTES,
            norms=ctypes.addressof(table.norms) + index * _NORM_BYTES,
            chain_heads=ctypes.addressof(table.chain_heads),
            chain_rows=ctypes.addressof(chain_rows),
            cos=tile.cos_RE.data_ptr(),
            sin=tile.sin_RE.data_ptr(),
            x=x_RD.data_ptr(),
            y=normed_RD.data_ptr(),
            num_layers=1,
            num_chains=1,
            num_active=1,
            num_tokens=num_rows,
            num_kv_heads=self._num_kv_heads,
            head_dim=self._head_dim,
            eps=self._eps,
            scale=self._head_dim**-0.5,
            dtype=native.dtype_id(x_RD.dtype),
            attention_variant=native.variant_id(variant),
        )
        args = PrefillLayerArgs(
            step,
            tile.k_KNE.data_ptr(),
            tile.v_KNE.data_ptr(),
            0 if delta_RD is None else delta_RD.data_ptr(),
            tile.first_token,
            num_keys,
            0 if tile.cancelled is None else tile.cancelled.address,
        )
        native.call(function, args, variant, torch.get_num_threads())
