"""Where Triton's kernels run: compiled on a GPU where there is one, else interpreted on the CPU's tensors."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

HAS_GPU = torch.cuda.is_available()

TRITON_DTYPES = (torch.float16, torch.float32, *((torch.bfloat16,) if HAS_GPU else ()))
"""Of arithmetic. The interpreter's bf16 is wrong in silence; bf16 differs from fp16 in no line of a kernel."""


class MadeOnGpu(TorchFunctionMode):
    """Tensors that are made inside lie on the GPU. Random ones are drawn on the CPU, so that they are the same ones."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Make what a test makes where the kernels are."""
        kwargs = dict(kwargs or {})
        if func not in _device_constructors() or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        if kwargs.get("generator") is None:
            return func(*args, **kwargs | {"device": "cuda"})
        drawn: Tensor = func(*args, **kwargs)
        return drawn.cuda()
