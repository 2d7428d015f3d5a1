"""Matrices of a module, one a chain: parameters, or the same weights in panels, as they are or quantised."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from colm_kernels.panels import in_panels, panels_shape
from colm_kernels.quantised import GROUP_INPUTS, Quantisation, in_quantised_panels, quantised_shape
from colm_kernels.staircase import LaidOut, Weights
from torch import Tensor, nn

from colm.errors import ConfigError
from colm.huge_pages import empty_side_by_side

KV_PROJECTIONS: Final = (".wk", ".wv")
"""Ends of the names of the modules that make keys and values."""
TABLES: Final = ("embedding", "head")
"""Names of the modules that make hidden states of tokens, and logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightLayout:
    """How the weights of a model of few rows lie in memory."""

    dtype: torch.dtype
    """Of what is not quantised, and of the computation."""
    quantisation: Quantisation | None = None
    """Of the matrices that a step multiplies by, each chain's apart; None leaves them as they are."""
    quantise_kv_projections: bool = False
    """Those too that make keys and values; else they are left, since whoever prefills has them unquantised."""
    only_drafts: bool = False
    """Nothing that is computed with them lasts: all matrices are quantised alike, tables and those that make keys and
    values too, and q4 takes each group's span, which is found in a quarter of the time."""

    def quantisation_of(self, module_name: str) -> Quantisation | None:
        """Of the matrices of a module. A table is below int8 in drafts only: each logit is one of its rows."""
        if self.only_drafts:
            return self.quantisation
        if module_name.endswith(KV_PROJECTIONS) and not self.quantise_kv_projections:
            return None
        return "int8" if self.quantisation and module_name in TABLES else self.quantisation


class ChainWeights(nn.Module):
    """Parameters named `chain1`, `chain2`, ...; where panels stand in their place, they are never given memory."""

    names: Sequence[str]
    """Of the chains that were built."""

    _panels: Sequence[LaidOut] = ()

    def weights(self, num_chains: int) -> Weights:
        """The matrices of the first `num_chains` chains."""
        return self._panels[:num_chains] if self._panels else self.matrices(num_chains)

    def matrices(self, num_chains: int) -> list[Tensor]:
        """The parameters of the first `num_chains` chains, as the oracle and training need them."""
        return [self.get_parameter(name) for name in self.names[:num_chains]]

    def take(self, panels: Sequence[LaidOut]) -> None:
        """Use these in place of the parameters, one a chain."""
        self._panels = panels


def lay_out_in_panels(
    modules: Mapping[str, ChainWeights], weight_of: Callable[[str], Tensor], layout: WeightLayout
) -> list[str]:
    """Give modules their weights in panels, side by side in huge pages where the system has them.

    Args:
        modules: on the meta device, by their names in the model.
        weight_of: gives the tensor of a name. It is called for one after the other, and each is let go of at once.
        layout: what becomes of each.

    Returns:
        The names of the tensors that were laid out.

    Raises:
        ConfigError: a matrix cannot be quantised.
    """
    whole: dict[str, torch.Size] = {}
    quantised: dict[str, torch.Size] = {}
    for module_name, module in modules.items():
        quantisation = layout.quantisation_of(module_name)
        for name, parameter in zip(module.names, module.matrices(len(module.names)), strict=True):
            tensor_name, shape = f"{module_name}.{name}", parameter.shape
            if quantisation is None:
                whole[tensor_name] = panels_shape(shape, layout.dtype)
            else:
                _check_groups(tensor_name, shape, layout)
                quantised[tensor_name] = quantised_shape(shape, quantisation)
    places = empty_side_by_side(whole, layout.dtype) | empty_side_by_side(quantised, torch.uint8)
    for module_name, module in modules.items():
        names = [f"{module_name}.{name}" for name in module.names]
        quantisation = layout.quantisation_of(module_name)
        module.take([_laid_out(weight_of, name, places[name], quantisation, layout) for name in names])
    return [*whole, *quantised]


def _check_groups(name: str, shape: torch.Size, layout: WeightLayout) -> None:
    if shape[1] % GROUP_INPUTS:
        raise ConfigError(
            f"weights={layout.quantisation!r}: tensor {name!r} has {shape[1]} inputs, not a multiple of "
            f"{GROUP_INPUTS}; leave the weights as stored"
        )


def _laid_out(
    weight_of: Callable[[str], Tensor],
    name: str,
    place: Tensor,
    quantisation: Quantisation | None,
    layout: WeightLayout,
) -> LaidOut:
    weight_OI = weight_of(name)
    if quantisation is None:
        return in_panels(weight_OI, place)
    try:
        return in_quantised_panels(weight_OI, place, layout.dtype, quantisation, fits=not layout.only_drafts)
    except ValueError as err:
        raise ConfigError(
            f"weights={layout.quantisation!r}: tensor {name!r}: {err}; leave the weights as stored"
        ) from err
