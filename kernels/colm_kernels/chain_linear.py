"""Linear (chain): output chain i reads input chains 1..i, so the stacked weight is a staircase.

Shapes: R rows, I input features of the active chains, O output features of the active chains.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from colm_kernels.checks import check_dims, check_dtype, check_one_device, check_same_dtype
from colm_kernels.few_rows_linear import few_rows_linear, variant_for


def chain_linear_reference(
    x_RI: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, chain_rows: Sequence[int]
) -> Tensor:
    """The definition, as one masked full-width product; see `chain_linear`."""
    in_dims = [weight.shape[1] for weight in weights]
    out_dims = [weight.shape[0] for weight in weights]
    full = x_RI.new_zeros(sum(out_dims), in_dims[-1])
    row = 0
    for weight in weights:
        full[row : row + weight.shape[0], : weight.shape[1]] = weight
        row += weight.shape[0]
    y_RO = x_RI @ full.T
    if biases is not None:
        y_RO = y_RO + torch.cat(list(biases))
    column = 0
    for out_dim, rows in zip(out_dims, chain_rows, strict=True):
        y_RO[rows:, column : column + out_dim] = 0
        column += out_dim
    return y_RO


def chain_linear(
    x_RI: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, chain_rows: Sequence[int]
) -> Tensor:
    """Apply the staircase, chain by chain, to as many leading rows as each chain serves.

    Few rows without gradients, as in decode, run in the library: bounded by memory, and what a row gets is then
    bit-identical in any batch and at any scale. The rest is one PyTorch product a chain.

    Args:
        x_RI: input of the active chains, side by side; I = weights[-1].shape[1].
        weights: one block a chain, (O_i, I_1 + .. + I_i).
        biases: one (O_i,) a chain, or None.
        chain_rows: for chain i the number of leading rows that compute it; never increasing. Rows that run at a
            larger scale stand first, so a batch of mixed scales reads every weight once.

    Returns:
        y_RO, chains side by side; zero where a row does not compute a chain.

    Raises:
        ValueError: shapes or chain_rows that do not fit together.

    Example: weights of 2 chains and chain_rows (3, 1): row 0 gets both chains, rows 1 and 2 chain 1 and zeros.
    """
    _check(x_RI, weights, biases, chain_rows)
    if x_RI.is_cuda:
        from colm_kernels.gpu import chain_linear as on_gpu

        named = {f"weights[{chain}]": weight for chain, weight in enumerate(weights)}
        named |= {f"biases[{chain}]": bias for chain, bias in enumerate(biases or ())}
        check_dtype("x_RI", x_RI, torch.bfloat16, torch.float16, torch.float32)
        check_same_dtype(x_RI=x_RI, **named)
        check_one_device(x_RI=x_RI, **named)
        return on_gpu.chain_linear(x_RI, weights, biases, chain_rows)
    variant = variant_for(x_RI, weights, biases)
    if variant != "torch":
        return few_rows_linear(x_RI, weights, biases, chain_rows, variant)
    outputs = []
    num_rows = x_RI.shape[0]
    for chain, (weight, rows) in enumerate(zip(weights, chain_rows, strict=True)):
        bias = None if biases is None else biases[chain]
        y = F.linear(x_RI[:rows, : weight.shape[1]], weight, bias)
        outputs.append(y if rows == num_rows else F.pad(y, (0, 0, 0, num_rows - rows)))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _check(x_RI: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, chain_rows: Sequence[int]) -> None:
    # Called 210 times a decode step: plain comparisons where all is well.
    if x_RI.dim() != 2:
        check_dims("x_RI", x_RI, None, None)
    num_rows, in_dim = x_RI.shape
    if not weights or len(weights) != len(chain_rows):
        raise ValueError(
            f"weights has {len(weights)} chains and chain_rows {len(chain_rows)}; give at least one of each"
        )
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"biases has {len(biases)} chains, expected {len(weights)} or None")
    most_rows, width = num_rows, 0
    for chain, (weight, rows) in enumerate(zip(weights, chain_rows, strict=True)):
        shape = weight.shape
        if len(shape) != 2 or not width <= shape[1] <= in_dim:
            raise ValueError(f"weights[{chain}] has shape {tuple(shape)}, expected (*, {width} to {in_dim})")
        if not 0 <= rows <= most_rows:
            raise ValueError(f"chain_rows[{chain}]={rows} must be between 0 and {most_rows}; rows never increase")
        if biases is not None:
            check_dims(f"biases[{chain}]", biases[chain], shape[0])
        most_rows, width = rows, shape[1]
    if width != in_dim:
        raise ValueError(f"x_RI has {in_dim} features, expected the {width} that weights[-1] reads")
