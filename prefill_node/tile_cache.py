"""One tile's view of a layer's keys and values.

Shapes: N prompt tokens, T tokens of a tile, S keys up to its end, H query heads, K kv heads, G query heads per kv head,
E head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

from colm_kernels.rotary import write_kv
from torch import Tensor

from colm.model.block import Rows

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_THE, k_KSE, v_KSE) to out_THE: what each rotated query of a tile gathers."""


@dataclass(frozen=True, slots=True)
class TileCache:
    """A `LayerCache` of which a tile writes its own part and reads all up to its end."""

    k_KNE: Tensor
    v_KNE: Tensor
    start: int
    stop: int
    attention: Attention

    def write(self, k_TKE: Tensor, v_TKE: Tensor, rows: Rows) -> None:
        """Store the tile's keys, rotated on the way, and its values."""
        k_KTE, v_KTE = self.k_KNE[:, self.start : self.stop], self.v_KNE[:, self.start : self.stop]
        write_kv(k_TKE, v_TKE, rows.cos_RE, rows.sin_RE, k_KTE.transpose(0, 1), v_KTE.transpose(0, 1))

    def attend(self, q_TKGE: Tensor) -> Tensor:
        """What each of the tile's queries gathers: out_TKGE."""
        k_KSE, v_KSE = self.k_KNE[:, : self.stop], self.v_KNE[:, : self.stop]
        return self.attention(q_TKGE.flatten(1, 2), k_KSE, v_KSE).view_as(q_TKGE)
