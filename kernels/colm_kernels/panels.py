"""Weights in panels: the layout of a node that reads them with few rows.

A panel holds 32 outputs, transposed: at each step one word of each, side by side. A word is one fp32, or two bf16 that
follow each other along the inputs. A vector register then holds one word of several outputs, so no sum goes across its
lanes, and weights are read in the order of their addresses, however many rows multiply them.

Shapes: O output features, I input features; P panels, W words of the inputs, N words' elements.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from colm_kernels import native
from colm_kernels.native import Variant

PANEL_OUTPUTS: Final = 32
"""`kPanelOutputs` of abi.h."""

_ELEMENTS_PER_WORD: Final = {torch.bfloat16: 2, torch.float32: 1}


@dataclass(frozen=True, slots=True)
class Panels:
    """One weight in panels: what `chain_linear` takes in place of weight_OI, on the CPU and without gradients."""

    panels: Tensor
    """(P, W, 32, N), contiguous; zeros where O or I end inside a panel or a word."""
    shape: torch.Size
    """(O, I) of the weight."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight's elements."""
        return self.panels.dtype

    @property
    def stored(self) -> Tensor:
        """The memory that a step reads."""
        return self.panels

    @property
    def format_id(self) -> int:
        """`WeightFormat` of abi.h."""
        return 1

    def data_ptr(self) -> int:
        """Where the panels lie."""
        return self.panels.data_ptr()

    def columns(self) -> Tensor:
        """The weight as a view weight_PNOI of four dimensions: panel, output of it, word, element of the word."""
        return self.panels.permute(0, 2, 1, 3)

    def rows(self) -> Tensor:
        """A copy as weight_OI."""
        out_dim, in_dim = self.shape
        num_panels, num_words, outputs, elements = self.panels.shape
        return self.columns().reshape(num_panels * outputs, num_words * elements)[:out_dim, :in_dim].contiguous()

    def select(self, outputs_R: Tensor) -> Tensor:
        """Rows `outputs_R` of weight_OI, int64, as a tensor of (R, I)."""
        words_RWN = self.columns()[outputs_R // PANEL_OUTPUTS, outputs_R % PANEL_OUTPUTS]
        return words_RWN.flatten(1)[:, : self.shape[1]].contiguous()


def library_variant(dtype: torch.dtype) -> Variant:
    """The variant that multiplies by panels of this dtype; "torch" where the library cannot."""
    if dtype not in _ELEMENTS_PER_WORD:
        return "torch"
    return native.forced_variant() or native.default_variant(dtype)


def pays(dtype: torch.dtype) -> bool:
    """Whether a node that multiplies weights of this dtype with few rows does well to have them in panels.

    On two cores of an AMD Zen 4 they are 1.0x to 1.1x as fast as weights by rows at 1 to 8 rows of bf16, 1.2x at 16 and
    1.4x at 64, and 1.2x to 1.7x in fp32. On one core of a busy AMD Zen 3, which has AVX2 alone, bf16 in panels is as
    fast at 1 and 2 rows, 1.2x to 1.5x at 3 to 8, 1.5x at 16 and 1.6x at 64. bf16 on CPUs with AMX is left by rows:
    PyTorch uses AMX, the library does not.
    """
    has_amx = native.forced_variant() is None and torch.cpu.get_capabilities().get("amx_bf16", False)
    return library_variant(dtype) != "torch" and not (dtype == torch.bfloat16 and has_amx)


def panels_shape(shape: torch.Size, dtype: torch.dtype) -> torch.Size:
    """What a weight_OI of this shape takes in panels: (P, W, 32, N)."""
    out_dim, in_dim = shape
    elements = _ELEMENTS_PER_WORD[dtype]
    return torch.Size((-(-out_dim // PANEL_OUTPUTS), -(-in_dim // elements), PANEL_OUTPUTS, elements))


def in_panels(weight_OI: Tensor, panels: Tensor) -> Panels:
    """Lay a weight out in memory of `panels_shape`, in that memory's dtype."""
    out_dim, in_dim = weight_OI.shape
    num_panels, num_words, outputs, elements = panels.shape
    whole = weight_OI
    if whole.shape != (num_panels * outputs, num_words * elements):
        whole = weight_OI.new_zeros(num_panels * outputs, num_words * elements)
        whole[:out_dim, :in_dim] = weight_OI
    panels.copy_(whole.view(num_panels, outputs, num_words, elements).transpose(1, 2))
    return Panels(panels, weight_OI.shape)
