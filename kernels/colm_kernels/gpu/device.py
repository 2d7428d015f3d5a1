"""Launches a kernel on its tensors' device, and names the architecture whose configs suit that device."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from colm_kernels.gpu.specimen import Arch

Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def on_its_device(
    function: Callable[Concatenate[Tensor, Rest], Result],
) -> Callable[Concatenate[Tensor, Rest], Result]:
    """Make the first argument's device the current one during a call: Triton launches on the current device."""

    @wraps(function)
    def wrapper(first: Tensor, /, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        with torch.cuda.device_of(first):
            return function(first, *args, **kwargs)

    return wrapper


def arch_of(tensor: Tensor) -> Arch:
    """90 on a GPU of compute capability 9 or more, else 80; also 80 off CUDA, where kernels are interpreted."""
    return 90 if tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] >= 9 else 80
