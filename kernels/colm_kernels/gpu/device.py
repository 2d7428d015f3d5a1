"""Where a launch goes: the device of its tensors, and which architecture's configs suit it."""

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
    """Run with the first argument's device as the current one, on which Triton launches whatever the tensors say."""

    @wraps(function)
    def wrapper(first: Tensor, /, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        with torch.cuda.device_of(first):
            return function(first, *args, **kwargs)

    return wrapper


def arch_of(tensor: Tensor) -> Arch:
    """The architecture whose configs suit a tensor's device; sm_80's off CUDA, where kernels are interpreted."""
    return 90 if tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] >= 9 else 80
