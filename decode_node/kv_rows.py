"""Keys, or values, of one layer as rows of the pages, and how what comes is written into them.

Of a stream in raw or int8, into pages of the model's dtype or of int8:

              pages of the model's dtype     pages of int8
    raw       copied                         quantised, once
    int8      widened, rounded once          copied, scales included

Shapes: K kv heads, D head dim, T tokens, S = B * P rows.
"""

from dataclasses import dataclass

from colm_kernels.kv_payload import scatter_rows
from colm_kernels.kv_quantise import write_dequantised_kv, write_quantised_kv
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KvRows:
    """Row page * P + slot has one token's keys or values of all kv heads."""

    rows_SKD: Tensor
    scales_SK: Tensor | None
    """bf16, of which int8 rows are multiples; None in the model's dtype."""

    def write_run(self, slot: int, tokens_KTD: Tensor, scale_KT: Tensor | None) -> None:
        """Store tokens in neighbouring rows, in the calling thread alone: the others decode.

        Args:
            slot: the first row.
            tokens_KTD: in the model's dtype, or in int8.
            scale_KT: bf16, at any address; of int8 tokens.
        """
        rows = slice(slot, slot + tokens_KTD.shape[1])
        rows_TKD, tokens_TKD = self.rows_SKD[rows], tokens_KTD.transpose(0, 1)
        if self.scales_SK is None:
            if scale_KT is None:
                scatter_rows(tokens_KTD, rows_TKD)
            else:
                write_dequantised_kv(tokens_TKD, scale_KT.t(), rows_TKD, num_threads=1)
        elif scale_KT is None:
            write_quantised_kv(tokens_TKD, rows_TKD, self.scales_SK[rows], num_threads=1)
        else:
            scatter_rows(tokens_KTD, rows_TKD)
            self.scales_SK[rows].copy_(scale_KT.t())

    def write_tokens(self, slot_mapping_T: Tensor, tokens_TKD: Tensor) -> None:
        """Quantise tokens into int8 rows of their own; `slot_mapping_T` in int64."""
        assert self.scales_SK is not None
        write_quantised_kv(tokens_TKD, self.rows_SKD, self.scales_SK, slot_mapping_T)
