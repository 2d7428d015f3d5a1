"""The token table and the nested head, both split by chain along the model dim.

Shapes: R rows, D model features of the active chains, V vocabulary.
"""

from collections.abc import Sequence

import torch
from colm_kernels.chain_linear import chain_linear
from torch import Tensor, nn
from torch.nn import functional as F

from colm.model.weights import ChainWeights


class ChainTable(ChainWeights):
    """A (V, D) matrix whose columns belong to chains: `chain1` (V, D_1), `chain2` (V, D_2), ..."""

    def __init__(self, vocab_size: int, dims: Sequence[int]) -> None:
        super().__init__()
        self.names = [f"chain{chain + 1}" for chain in range(len(dims))]
        for name, dim in zip(self.names, dims, strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(vocab_size, dim)))

    def embed(self, tokens_R: Tensor, num_chains: int) -> Tensor:
        """x_RD: row `tokens_R[r]` of the first `num_chains` chains."""
        rows = self.embed_by_chain(tokens_R, num_chains)
        return rows[0] if num_chains == 1 else torch.cat(rows, dim=1)

    def embed_by_chain(self, tokens_R: Tensor, num_chains: int) -> list[Tensor]:
        """The result of `embed`, one tensor a chain."""
        tables = self.weights(num_chains)
        return [F.embedding(tokens_R, t) if isinstance(t, Tensor) else t.select(tokens_R) for t in tables]

    def logits(self, x_RD: Tensor, chain_rows: Sequence[int]) -> Tensor:
        """logits_RV of normalised hidden states, each row at its own scale.

        Chains are added one after the other, so that a chain whose columns are zero leaves the sum
        bit-identical; that is what makes a freshly expanded model answer exactly like its first chain.
        """
        tables = self.weights(len(chain_rows))
        num_rows = x_RD.shape[0]
        column = tables[0].shape[1]
        logits_RV = chain_linear(x_RD[:, :column], tables[:1], None, (num_rows,))
        for table, rows in zip(tables[1:], chain_rows[1:], strict=True):
            x_RI = x_RD[:, column : column + table.shape[1]]
            logits_RV = logits_RV + chain_linear(x_RI, (table,), None, (rows,))
            column += table.shape[1]
        return logits_RV


def nested_logits(xs: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """logits_RV of the scale of all given chains: x_1 W_1^T + x_2 W_2^T + .., in the order of `ChainTable.logits`.

    Args:
        xs: normalised hidden states, (R, D_i) each.
        columns: the head's, (V, D_i) each.
    """
    logits_RV = F.linear(xs[0], columns[0])
    for x, table in zip(xs[1:], columns[1:], strict=True):
        logits_RV = logits_RV + F.linear(x, table)
    return logits_RV
