"""Matrices of a module, one a chain: parameters, or the same weights in panels."""

from collections.abc import Callable, Mapping, Sequence

import torch
from colm_kernels.panels import Panels, in_panels, panels_shape
from colm_kernels.staircase import Weights
from torch import Tensor, nn

from colm.huge_pages import empty_side_by_side


class ChainWeights(nn.Module):
    """Parameters named `chain1`, `chain2`, ...; where panels stand in their place, they are never given memory."""

    names: Sequence[str]
    """Of the chains that were built."""

    _panels: Sequence[Panels] = ()

    def weights(self, num_chains: int) -> Weights:
        """The matrices of the first `num_chains` chains."""
        return self._panels[:num_chains] if self._panels else self.matrices(num_chains)

    def matrices(self, num_chains: int) -> list[Tensor]:
        """The parameters of the first `num_chains` chains, as the oracle and training need them."""
        return [self.get_parameter(name) for name in self.names[:num_chains]]

    def take(self, panels: Sequence[Panels]) -> None:
        """Use these in place of the parameters, one a chain."""
        self._panels = panels


def lay_out_in_panels(
    modules: Mapping[str, ChainWeights], weight_of: Callable[[str], Tensor], dtype: torch.dtype
) -> list[str]:
    """Give modules their weights in panels, all side by side in huge pages where the system has them.

    Args:
        modules: on the meta device, by their names in the model.
        weight_of: gives the tensor of a name. It is called for one after the other, and each is let go of at once.
        dtype: of the panels.

    Returns:
        The names of the tensors that were laid out.
    """
    shapes = {
        f"{module_name}.{name}": parameter.shape
        for module_name, module in modules.items()
        for name, parameter in zip(module.names, module.matrices(len(module.names)), strict=True)
    }
    places = empty_side_by_side({name: panels_shape(shape, dtype) for name, shape in shapes.items()}, dtype)
    for module_name, module in modules.items():
        names = [f"{module_name}.{name}" for name in module.names]
        module.take([in_panels(weight_of(name), places[name]) for name in names])
    return list(shapes)
