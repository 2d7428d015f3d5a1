"""Quantised weights in panels: a quarter to a half of the bytes that a step of few rows reads.

Inputs in groups of 32, each with a scale of its own; every output has its own groups. Only weights are quantised: they
multiply x as it is, and stand for exact numbers, scale * q + minimum.

    int8  q in -127 .. 127, no minimum   8.5 bits a weight   as GGUF's Q8_0
    q4    q in 0 .. 15                   5 bits a weight     as GGUF's Q4_1

What a file of such blocks was dequantised to in fp32 gives the file's own blocks again: q, scale and minimum, bit for
bit. Rounded to bf16 on the way, it does not.

Shapes: O output features, I input features; P panels, G groups of the inputs, C outputs of a panel, W words of a group.
"""

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from colm_kernels.panels import PANEL_OUTPUTS

Quantisation = Literal["int8", "q4"]

GROUP_INPUTS: Final = 32
"""`kGroupInputs` of abi.h. Groups of 64 would save 3% of int8's bytes and have larger errors."""

_FORMAT_IDS: Final[dict[Quantisation, int]] = {"int8": 2, "q4": 3}
_OUTPUT_BYTES: Final[dict[Quantisation, int]] = {"int8": 34, "q4": 20}
_INT8_LARGEST, _Q4_LARGEST = 127, 15
_ON_GRID: Final = 1 / 16
"""Root mean square of a group's errors, in steps, up to which its weights lie on q4's grid: evenly spread ones have
0.29, and those on it that were rounded to bf16 about 0.01."""
_NUM_FITS: Final = 2
"""Of least squares: the squared error of a group falls to 0.91, 0.87 and 0.86 of the span's in 1, 2 and 3."""
_WORD_INPUTS: Final = 8
_SHIFTS: Final = (0, 16, 4, 20, 8, 24, 12, 28)
"""Bits of q4's words where input 0, 1, .. of a word lies."""
_ROWS_AT_ONCE: Final = 64 * PANEL_OUTPUTS
"""Outputs that are quantised at once, so that a large table takes little memory beside its result."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """A weight in numbers: weight = scale * q + minimum."""

    q_OI: Tensor
    """Whole numbers, int16."""
    scale_OG: Tensor
    """float16."""
    minimum_OG: Tensor | None
    """float16; None in int8."""

    def weight(self) -> Tensor:
        """weight_OI in float64, exactly."""
        q_OGN = self.q_OI.unflatten(1, (-1, GROUP_INPUTS)).double()
        weight_OGN: Tensor = q_OGN * self.scale_OG.double().unsqueeze(2)
        if self.minimum_OG is not None:
            weight_OGN += self.minimum_OG.double().unsqueeze(2)
        return weight_OGN.flatten(1)


def quantise(weight_OI: Tensor, quantisation: Quantisation, *, fits: bool = True) -> Blocks:
    """Quantise a weight: the definition.

    The scale of int8 is the largest magnitude over 127. q4 begins with the span over 15, above the smallest. Where its
    weights lie on that grid, as those of a file of such blocks do, they stay there; elsewhere scale and minimum are
    fitted to them. Both are rounded to fp16 before numbers are divided by them.

    Args:
        weight_OI: of any floating dtype.
        quantisation: the format.
        fits: False leaves q4 on the grid of the span everywhere, in a quarter of the time.

    Raises:
        ValueError: I is not a multiple of 32, or a scale or a minimum is beyond fp16.
    """
    out_dim, in_dim = weight_OI.shape
    if in_dim % GROUP_INPUTS:
        raise ValueError(f"{in_dim} inputs are not a multiple of {GROUP_INPUTS}")
    weight_OGN = weight_OI.float().view(out_dim, in_dim // GROUP_INPUTS, GROUP_INPUTS)
    if quantisation == "int8":
        scale_OG = (weight_OGN.abs().amax(dim=2) / _INT8_LARGEST).half()
        q_OGN = _numbers(weight_OGN, scale_OG, -_INT8_LARGEST, _INT8_LARGEST)
        minimum_OG = None
    else:
        q_OGN, scale_OG, minimum_OG = _q4(weight_OGN) if fits else _q4_of_span(weight_OGN)
    for numbers in (scale_OG, minimum_OG):
        if numbers is not None and not numbers.isfinite().all():
            raise ValueError(f"weights up to {float(weight_OI.abs().max()):.3g} are beyond fp16")
    return Blocks(q_OGN.flatten(1).to(torch.int16), scale_OG, minimum_OG)


def _numbers(weight_OGN: Tensor, scale_OG: Tensor, lowest: int, highest: int) -> Tensor:
    divisor_OG1 = torch.where(scale_OG == 0, 1.0, scale_OG.float()).unsqueeze(2)
    return (weight_OGN / divisor_OG1).round_().clamp_(lowest, highest)


def _q4_of_span(weight_OGN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, scale and minimum, of the span."""
    least_OG, most_OG = weight_OGN.aminmax(dim=2)
    scale_OG, minimum_OG = ((most_OG - least_OG) / _Q4_LARGEST).half(), least_OG.half()
    above_OGN = weight_OGN - minimum_OG.float().unsqueeze(2)
    return _numbers(above_OGN, scale_OG, 0, _Q4_LARGEST), scale_OG, minimum_OG


def _q4(weight_OGN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, scale and minimum: of the span, then of least squares over its numbers where that is nearer."""

    def with_error(scale_OG: Tensor, minimum_OG: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        above_OGN = weight_OGN - minimum_OG.float().unsqueeze(2)
        q_OGN = _numbers(above_OGN, scale_OG, 0, _Q4_LARGEST)
        error_OG = above_OGN.sub_(q_OGN * scale_OG.float().unsqueeze(2)).square_().sum(dim=2)
        return q_OGN, scale_OG, minimum_OG, error_OG

    least_OG, most_OG = weight_OGN.aminmax(dim=2)
    best = with_error(((most_OG - least_OG) / _Q4_LARGEST).half(), least_OG.half())
    is_on_grid_OG = best[3] <= GROUP_INPUTS * (_ON_GRID * best[1].float()).square()
    mean_OG = weight_OGN.mean(dim=2)
    for _ in range(_NUM_FITS):
        q_OGN = best[0]
        q_mean_OG = q_OGN.mean(dim=2)
        q_centred_OGN = q_OGN - q_mean_OG.unsqueeze(2)
        # Equal numbers have no slope; such a group is on its grid.
        spread_OG = q_centred_OGN.square().sum(dim=2).clamp_(min=1.0)
        scale_OG = (q_centred_OGN * weight_OGN).sum(dim=2) / spread_OG
        fitted = with_error(scale_OG.half(), (mean_OG - scale_OG * q_mean_OG).half())
        is_nearer_OG = (fitted[3] < best[3]) & ~is_on_grid_OG
        q_OGN = torch.where(is_nearer_OG.unsqueeze(2), fitted[0], q_OGN)
        scale_OG, minimum_OG, error_OG = (
            torch.where(is_nearer_OG, ours, theirs) for ours, theirs in zip(fitted[1:], best[1:], strict=True)
        )
        best = q_OGN, scale_OG, minimum_OG, error_OG
    return best[:3]


@dataclass(frozen=True, slots=True)
class QuantisedPanels:
    """A quantised weight in panels: what `chain_linear` takes in place of weight_OI, on the CPU, without gradients."""

    stored: Tensor
    """uint8 (P, G, bytes of a group), contiguous: as abi.h has it; zeros where O ends inside a panel."""
    shape: torch.Size
    """(O, I) of the weight."""
    dtype: torch.dtype
    """Of x, and of what `rows` and `select` give."""
    quantisation: Quantisation

    @property
    def format_id(self) -> int:
        """`WeightFormat` of abi.h."""
        return _FORMAT_IDS[self.quantisation]

    def data_ptr(self) -> int:
        """Where the panels lie."""
        return self.stored.data_ptr()

    def blocks(self, outputs_R: Tensor | None = None) -> Blocks:
        """The numbers of outputs `outputs_R`, int64; None for all, in their order."""
        if outputs_R is None:
            outputs_R = torch.arange(self.shape[0])
        panel_R, place_R = outputs_R // PANEL_OUTPUTS, outputs_R % PANEL_OUTPUTS
        halves = 1 if self.quantisation == "int8" else 2
        num_groups, scale_bytes = self.stored.shape[1], 2 * PANEL_OUTPUTS * halves
        scales_PGHC = self.stored[:, :, :scale_bytes].view(torch.float16).unflatten(2, (halves, PANEL_OUTPUTS))
        scale_RGH = scales_PGHC[panel_R, :, :, place_R]
        q_PG = self.stored[:, :, scale_bytes:]
        if self.quantisation == "int8":
            q_PGIC = q_PG.view(torch.int8).unflatten(2, (GROUP_INPUTS, PANEL_OUTPUTS))
            q_RGI = q_PGIC[panel_R, :, :, place_R].to(torch.int16)
        else:
            words_PGWC = q_PG.view(torch.int32).unflatten(2, (-1, PANEL_OUTPUTS))
            words_RGW = words_PGWC[panel_R, :, :, place_R]
            q_RGI = (((words_RGW.unsqueeze(3) >> torch.tensor(_SHIFTS)) & 15) ^ 8).flatten(2).to(torch.int16)
        minimum_RG = None if self.quantisation == "int8" else scale_RGH[:, :, 1]
        return Blocks(q_RGI.view(len(outputs_R), num_groups * GROUP_INPUTS), scale_RGH[:, :, 0], minimum_RG)

    def rows(self, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers that it stands for, as weight_OI; in `dtype`, by default its own."""
        parts = torch.arange(self.shape[0]).split(_ROWS_AT_ONCE)
        return torch.cat([self.blocks(part).weight().to(dtype or self.dtype) for part in parts])

    def select(self, outputs_R: Tensor) -> Tensor:
        """Rows `outputs_R` of weight_OI, int64, as a tensor of (R, I)."""
        return self.blocks(outputs_R).weight().to(self.dtype)


def quantised_shape(shape: torch.Size, quantisation: Quantisation) -> torch.Size:
    """What a weight_OI of this shape takes in bytes: (P, G, bytes of a group)."""
    out_dim, in_dim = shape
    group_bytes = PANEL_OUTPUTS * _OUTPUT_BYTES[quantisation]
    return torch.Size((-(-out_dim // PANEL_OUTPUTS), in_dim // GROUP_INPUTS, group_bytes))


def in_quantised_panels(
    weight_OI: Tensor, stored: Tensor, dtype: torch.dtype, quantisation: Quantisation, *, fits: bool = True
) -> QuantisedPanels:
    """Quantise a weight into memory of `quantised_shape`; `fits` as in `quantise`.

    Raises:
        ValueError: as from `quantise`.
    """
    for start in range(0, weight_OI.shape[0], _ROWS_AT_ONCE):
        rows = weight_OI[start : start + _ROWS_AT_ONCE]
        panel = start // PANEL_OUTPUTS
        blocks = quantise(rows, quantisation, fits=fits)
        _store(blocks, stored[panel : panel - (-len(rows) // PANEL_OUTPUTS)], quantisation)
    return QuantisedPanels(stored, weight_OI.shape, dtype, quantisation)


def _store(blocks: Blocks, stored: Tensor, quantisation: Quantisation) -> None:
    num_panels, num_groups, _ = stored.shape

    def by_panel(numbers_O: Tensor) -> Tensor:
        """(P, G, .., C) of (O, G * ..), with zeros behind the last output."""
        whole = numbers_O.new_zeros(num_panels * PANEL_OUTPUTS, numbers_O.shape[1])
        whole[: len(numbers_O)] = numbers_O
        return whole.view(num_panels, PANEL_OUTPUTS, num_groups, -1).permute(0, 2, 3, 1)

    parts = [by_panel(numbers) for numbers in (blocks.scale_OG, blocks.minimum_OG) if numbers is not None]
    q_PGIC = by_panel(blocks.q_OI)
    if quantisation == "int8":
        parts.append(q_PGIC.to(torch.int8))
    else:
        nibbles_PGWNC = ((q_PGIC ^ 8) & 15).to(torch.int32).unflatten(2, (-1, _WORD_INPUTS))
        shifted = nibbles_PGWNC << torch.tensor(_SHIFTS).view(-1, 1)
        parts.append(shifted.sum(dim=3).to(torch.int32))
    place = 0
    for part in parts:
        as_bytes = part.contiguous().flatten(2).view(torch.uint8)
        stored[:, :, place : place + as_bytes.shape[2]] = as_bytes
        place += as_bytes.shape[2]
