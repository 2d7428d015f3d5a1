"""Linear (chain): output chain i reads input chains 1..i, so the stacked weight is a staircase.

Shapes: R rows, I input features of the active chains, O output features of the active chains; I_i, O_i of chain i.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from colm_kernels.checks import check_dims, check_dtype, check_one_device, check_same_dtype
from colm_kernels.few_rows_linear import few_rows_linear, library_variant, variant_for
from colm_kernels.many_rows_linear import many_rows_linear, step_of_chain
from colm_kernels.packed_linear import packed_linear, packed_swiglu
from colm_kernels.packed_linear import takes as packed_takes
from colm_kernels.quantised import QuantisedPanels
from colm_kernels.staircase import LaidOut, Staircase, Weights, all_in_panels, any_quantised, as_rows
from colm_kernels.swiglu import swiglu_


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


def quantised_linear_reference(
    x_RI: Tensor, weights: Weights, biases: Sequence[Tensor] | None, chain_rows: Sequence[int]
) -> Tensor:
    """`chain_linear` of quantised weights in PyTorch: in fp32, so that only the result is rounded.

    It dequantises every weight at every call: right, and slow.
    """
    wide = [weight.rows(torch.float32) if isinstance(weight, QuantisedPanels) else weight for weight in weights]
    rows = [weight.float() for weight in as_rows(wide)]
    wide_biases = None if biases is None else [bias.float() for bias in biases]
    return many_rows_linear(x_RI.float(), rows, wide_biases, chain_rows).to(x_RI.dtype)


def chain_linear(x_RI: Tensor, weights: Weights, biases: Sequence[Tensor] | None, chain_rows: Sequence[int]) -> Tensor:
    """Apply the staircase, chain by chain, to as many leading rows as each chain serves.

    Few rows without gradients, as in decode, run in the library, which memory bounds. A row's result is then
    bit-identical in any batch and at any scale. With weights in panels, any number of rows does. So do many rows of
    bf16 where its products are the fastest, see `packed_linear`. Otherwise many rows take one PyTorch product a chain,
    and in the backward pass one for each weight and one for each input: a staircase of n steps cannot be cut into
    fewer than n rectangles without multiplying zeros. Tensors that require no gradient are left out of those products.

    Args:
        x_RI: input of the active chains, side by side; I = weights[-1].shape[1].
        weights: one block a chain, (O_i, I_1 + .. + I_i); as tensors, or all in panels, quantised or not.
        biases: one (O_i,) a chain, or None.
        chain_rows: for chain i the number of leading rows that compute it; never increasing. Rows that run at a
            larger scale stand first, so a batch of mixed scales reads every weight once.

    Returns:
        y_RO, chains side by side; zero where a row does not compute a chain. Differentiable once; accumulates in fp32,
        error budget in tolerance.py.

    Raises:
        ValueError: shapes, dtypes or chain_rows that do not fit together.

    Example: weights of 2 chains and chain_rows (3, 1): row 0 gets both chains, rows 1 and 2 chain 1 and zeros.
    """
    _check(x_RI, weights, biases, chain_rows)
    variant = variant_for(x_RI, weights, biases)
    if variant != "torch":
        return few_rows_linear(x_RI, weights, biases, chain_rows, variant)
    if any_quantised(weights):
        return quantised_linear_reference(x_RI, weights, biases, chain_rows)
    weights = as_rows(weights)
    if packed_takes(x_RI, weights, biases or ()):
        return packed_linear(x_RI, [(weights, biases, chain_rows)])[0]
    named = _named("weights", weights) | _named("biases", biases or ())
    check_same_dtype(x_RI=x_RI, **named)
    if x_RI.is_cuda:
        from colm_kernels.gpu import chain_linear as on_gpu

        check_dtype("x_RI", x_RI, torch.bfloat16, torch.float16, torch.float32)
        check_one_device(x_RI=x_RI, **named)
        return on_gpu.chain_linear(x_RI, weights, biases, chain_rows)
    return many_rows_linear(x_RI, weights, biases, chain_rows)


def chain_linear_by_chain(
    xs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor] | None
) -> list[Tensor]:
    """The staircase over one tensor a chain, with gradients only for the chains that train.

    Chain i is computed from the same contiguous operands however many chains follow, so a scale has the same bits
    alone and inside the whole model. The backward pass has no products for a frozen chain's weight and features.

    Args:
        xs: the input chains, (R, I_i) each.
        weights: (O_i, I_1 + .. + I_i), one a chain.
        biases: (O_i,), one a chain, or None.

    Returns:
        One (R, O_i) a chain; those that depend on nothing trainable carry no graph.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if not xs or len(xs) != len(weights) or len(weights) != len(weights if biases is None else biases):
        given = "None" if biases is None else len(biases)
        raise ValueError(f"xs has {len(xs)} chains, weights {len(weights)}, biases {given}; give one of each a chain")
    check_same_dtype(**_named("xs", xs), **_named("weights", weights), **_named("biases", biases or ()))
    width = 0
    for chain, (x, weight) in enumerate(zip(xs, weights, strict=True)):
        check_dims(f"xs[{chain}]", x, xs[0].shape[0], None)
        width += x.shape[1]
        check_dims(f"weights[{chain}]", weight, None, width)
        if biases is not None:
            check_dims(f"biases[{chain}]", biases[chain], weight.shape[0])
    return [
        step_of_chain(xs[: chain + 1], weight, None if biases is None else biases[chain])
        for chain, weight in enumerate(weights)
    ]


def _named(name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{name}[{chain}]": tensor for chain, tensor in enumerate(tensors)}


def joint_linear(x_RI: Tensor, staircases: Sequence[Staircase]) -> list[Tensor]:
    """Several staircases over the same x, such as queries, keys and values, or gate and up.

    What the library runs takes one call, whose fixed cost is then paid once.

    Args:
        x_RI: input of all; a staircase of fewer inputs reads the first of them.
        staircases: each as in `chain_linear`.

    Returns:
        One y_RO a staircase, bit-equal to `chain_linear`. They may be views of one tensor: features are contiguous,
        rows need not be.

    Raises:
        ValueError: shapes or chain_rows that do not fit together.

    Example: x of 5 features, weights of (4, 5) and (2, 3): y_1 of 4 features, and y_2 of 2 that read x[:, :3].
    """
    all_weights: list[Tensor | LaidOut] = []
    all_biases: list[Tensor] = []
    all_rows: list[int] = []
    out_dims = []
    for weights, biases, chain_rows in staircases:
        _check(_first_inputs(x_RI, weights), weights, biases, chain_rows)
        all_weights += weights
        all_biases += biases or ()
        all_rows += chain_rows
        out_dims.append(sum(weight.shape[0] for weight in weights))
    if len(all_biases) in (0, len(all_weights)):
        variant = variant_for(x_RI, all_weights, all_biases or None)
        if variant != "torch":
            y_RO = few_rows_linear(x_RI, all_weights, all_biases or None, all_rows, variant)
            return list(y_RO.split(out_dims, dim=1))
    if not all_in_panels(all_weights) and packed_takes(x_RI, as_rows(all_weights), all_biases):
        return packed_linear(x_RI, staircases)
    return [chain_linear(_first_inputs(x_RI, staircase[0]), *staircase) for staircase in staircases]


def swiglu_linear(x_RI: Tensor, gate: Staircase, up: Staircase) -> Tensor:
    """SwiGLU of two staircases over the same x: silu(gate(x)) * up(x).

    Args:
        x_RI: input of both.
        gate: as in `chain_linear`.
        up: as in `chain_linear`, in the shapes of `gate`.

    Returns:
        y_RO. Products accumulate in fp32. Many rows in the library are rounded once, others after either product too.

    Raises:
        ValueError: shapes, dtypes or chain_rows that do not fit together.
    """
    for weights, biases, chain_rows in (gate, up):
        _check(x_RI, weights, biases, chain_rows)
    (gates, gate_biases, gate_rows), (ups, up_biases, up_rows) = gate, up
    same = [weight.shape for weight in gates] == [weight.shape for weight in ups]
    if not same or tuple(gate_rows) != tuple(up_rows) or (gate_biases is None) != (up_biases is None):
        raise ValueError(
            f"gate and up differ: weights of {[tuple(w.shape) for w in gates]} and {[tuple(w.shape) for w in ups]}, "
            f"chain_rows {tuple(gate_rows)} and {tuple(up_rows)}, biases in both or in neither"
        )
    if all_in_panels(gates) or library_variant(len(x_RI), x_RI.dtype) != "torch":
        return swiglu_(*joint_linear(x_RI, [gate, up]))
    if packed_takes(x_RI, as_rows((*gates, *ups)), (*(gate_biases or ()), *(up_biases or ()))):
        return packed_swiglu(x_RI, gate, up)
    return swiglu_(*joint_linear(x_RI, [gate, up]))


def _first_inputs(x_RI: Tensor, weights: Weights) -> Tensor:
    width = weights[-1].shape[-1] if weights else 0
    return x_RI if width == x_RI.shape[-1] else x_RI[..., :width]


def _check(x_RI: Tensor, weights: Weights, biases: Sequence[Tensor] | None, chain_rows: Sequence[int]) -> None:
    # Called a hundred times a decode step: only plain comparisons when the arguments are right.
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
