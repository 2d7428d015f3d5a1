"""A decode step through all layers of a gated model in one call of the library.

It is the sequence of `chain_linear`, `rms_norm`, `rotary`, `swiglu` and `decode_attention` that a model's own modules
run, and gives the same bits; what is saved is what every call costs in Python.

Shapes: T tokens (packed), R requests, R1 = R + 1, L layers, D features of the active chains, K kv heads, E head dim, B
pages, P tokens per page, M page table columns.
"""

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from colm_kernels import native
from colm_kernels.few_rows_linear import library_variant
from colm_kernels.native import HEAD_DIMS, Variant
from colm_kernels.staircase import LaidOut, Weights, format_of, memory_of

Matrices = tuple[Weights, Sequence[Tensor] | None]
"""The weights of a linear, one a chain, and its biases."""


class StepArgs(ctypes.Structure):
    """`StepArgs` of abi.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                "matrices", "norms", "chain_heads", "chain_rows", "k_pages", "v_pages", "k_scales", "v_scales", "cos",
                "sin", "slots", "block_table", "context_lens", "cu_seqlens_q", "x", "y", "num_layers", "num_chains",
                "num_active", "num_tokens", "num_requests", "num_kv_heads", "head_dim", "num_pages", "page_tokens",
                "table_columns",
            )
        ),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("attention_variant", ctypes.c_int32),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLayer:
    """One layer's weights, all chains; keys and values are of chain 1."""

    attention_gains: Sequence[Tensor]
    queries: Matrices
    keys: Matrices
    values: Matrices
    output: Matrices
    ffn_gains: Sequence[Tensor]
    gate: Matrices
    up: Matrices
    down: Matrices

    @property
    def matrices(self) -> Sequence[Matrices]:
        """In the order of abi.h."""
        return (self.queries, self.keys, self.values, self.output, self.gate, self.up, self.down)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRows:
    """The tokens of a step and where they lie in pages."""

    chain_rows: Sequence[int]
    """For each active chain, how many leading tokens run it."""
    cos_TE: Tensor
    sin_TE: Tensor
    slot_mapping_T: Tensor
    """int64, page * P + slot."""
    block_table_RM: Tensor
    """As in `decode_attention`, like the two below."""
    context_lens_R: Tensor
    cu_seqlens_q_R1: Tensor


class StepTable:
    """Pointers to the weights of layers, as abi.h has them.

    Args:
        layers: contiguous tensors on the CPU, of one dtype but where quantised; they must not move as long as this
            object lives. On the meta device are those that no call reads. Linears are all in panels, or none is.
        final_gains: of the norm behind the last layer.
        chain_heads: query heads of each chain.
    """

    def __init__(self, layers: Sequence[StepLayer], final_gains: Sequence[Tensor], chain_heads: Sequence[int]) -> None:
        gains = [each for layer in layers for each in (layer.attention_gains, layer.ffn_gains)] + [final_gains]
        matrices = [each for layer in layers for each in layer.matrices]
        kinds = {not isinstance(weight, Tensor) for weights, _ in matrices for weight in weights}
        if len(kinds) > 1:
            raise ValueError("some weights are in panels and others are not; lay out all or none")
        self.in_panels = kinds == {True}
        weights = [weight for weight in _weights(gains, matrices) if not memory_of(weight).is_meta]
        self._tensors = [memory_of(weight) for weight in weights]
        self.dtype = weights[0].dtype
        for weight, tensor in zip(weights, self._tensors, strict=True):
            if weight.dtype != self.dtype or not (tensor.is_contiguous() and tensor.is_cpu):
                raise ValueError(f"a weight of {weight.dtype}, expected contiguous {self.dtype} on the CPU")
        self.norms = native.words([word for each in gains for gain in each for word in (_address(gain), len(gain))])
        self.matrices = native.words([word for each in matrices for word in _words(*each)])
        self.chain_heads = native.words(chain_heads)


class DecodeStep:
    """The weights of a model and the pages of its cache, ready for the library.

    Args:
        layers: contiguous tensors of one dtype on the CPU; they must not move as long as this object lives.
        final_gains: of the norm before the head.
        chain_heads: query heads of each chain.
        k_pages_LBPKE: keys of all layers, contiguous.
        v_pages_LBPKE: values likewise.
        k_scales_LBPK: bf16, of int8 pages, as in `decode_attention`; contiguous.
        v_scales_LBPK: likewise.
        eps: of the norms.
    """

    def __init__(
        self,
        layers: Sequence[StepLayer],
        final_gains: Sequence[Tensor],
        chain_heads: Sequence[int],
        k_pages_LBPKE: Tensor,
        v_pages_LBPKE: Tensor,
        k_scales_LBPK: Tensor | None = None,
        v_scales_LBPK: Tensor | None = None,
        *,
        eps: float,
    ) -> None:
        self._table = StepTable(layers, final_gains, chain_heads)
        for name, pages in (("k_pages_LBPKE", k_pages_LBPKE), ("v_pages_LBPKE", v_pages_LBPKE)):
            wanted = self._table.dtype if k_scales_LBPK is None else torch.int8
            if pages.dtype != wanted or not (pages.is_contiguous() and pages.is_cpu):
                raise ValueError(f"{name} is {pages.dtype}, expected contiguous {wanted} on the CPU")
        self._num_layers = len(layers)
        self._pages = (k_pages_LBPKE, v_pages_LBPKE)
        self._scales = (k_scales_LBPK, v_scales_LBPK)
        self._eps = eps

    def variant_for(self, num_tokens: int) -> Variant:
        """The variant that runs a step of so many tokens; "torch" where the library cannot or is not faster."""
        k_pages_LBPKE, _ = self._pages
        if k_pages_LBPKE.shape[-1] not in HEAD_DIMS:
            return "torch"
        return library_variant(num_tokens, self._table.dtype, in_panels=self._table.in_panels)

    def run(self, x_TD: Tensor, rows: StepRows, variant: Variant) -> Tensor:
        """Write the tokens' keys and values into the pages, and run all layers.

        Args:
            x_TD: contiguous; its tokens' embeddings, afterwards the residual stream.
            rows: the tokens.
            variant: of `variant_for`.

        Returns:
            y_TD: x after the final norm.

        Raises:
            BadTable: a slot, page or length is outside the pages; at most the first layer was written.
            ValueError: rows of more chains than there are, or of none.
        """
        num_chains, num_active = len(self._table.chain_heads), len(rows.chain_rows)
        if not 1 <= num_active <= num_chains:
            # The library would read pointers behind its tables.
            raise ValueError(f"chain_rows has {num_active} chains, and the step has weights of 1 to {num_chains}")
        k_pages_LBPKE, v_pages_LBPKE = self._pages
        _, num_pages, page_tokens, num_kv_heads, head_dim = k_pages_LBPKE.shape
        num_requests, table_columns = rows.block_table_RM.shape
        y_TD = torch.empty_like(x_TD)
        chain_rows = native.words(rows.chain_rows)
        args = StepArgs(
            ctypes.addressof(self._table.matrices), ctypes.addressof(self._table.norms),
            ctypes.addressof(self._table.chain_heads), ctypes.addressof(chain_rows),
            k_pages_LBPKE.data_ptr(), v_pages_LBPKE.data_ptr(),
            *(0 if scales is None else scales.data_ptr() for scales in self._scales),
            rows.cos_TE.data_ptr(), rows.sin_TE.data_ptr(),
            rows.slot_mapping_T.data_ptr(), rows.block_table_RM.data_ptr(), rows.context_lens_R.data_ptr(),
            rows.cu_seqlens_q_R1.data_ptr(), x_TD.data_ptr(), y_TD.data_ptr(),
            self._num_layers, num_chains, num_active, len(x_TD), num_requests,
            num_kv_heads, head_dim, num_pages, page_tokens, table_columns,
            self._eps, head_dim**-0.5, native.dtype_id(x_TD.dtype),
            native.variant_id(native.choose_memory_bound_variant(head_dim, x_TD)),
        )  # fmt: skip
        native.call("colm_decode_step", args, variant, torch.get_num_threads())
        return y_TD


def _weights(gains: Sequence[Sequence[Tensor]], matrices: Sequence[Matrices]) -> Iterator[Tensor | LaidOut]:
    for each in gains:
        yield from each
    for weights, biases in matrices:
        yield from weights
        yield from biases or ()


def _words(weights: Weights, biases: Sequence[Tensor] | None) -> Iterator[int]:
    """The `StepMatrix` of each chain."""
    for chain, weight in enumerate(weights):
        out_dim, in_dim = weight.shape
        bias = 0 if biases is None else _address(biases[chain])
        yield from (_address(weight), bias, in_dim, out_dim, format_of(weight))


def _address(tensor: Tensor | LaidOut) -> int:
    return 0 if memory_of(tensor).is_meta else tensor.data_ptr()
