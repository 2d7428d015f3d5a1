"""Argument checks that name the argument, shared by every operation."""

import torch
from torch import Tensor


def check_dims(name: str, tensor: Tensor, *sizes: int | None) -> None:
    """Refuse a tensor whose shape differs; None stands for any size.

    Raises:
        ValueError: names the argument, its shape and the shape expected.
    """
    shape = tuple(tensor.shape)
    fits = len(shape) == len(sizes) and all(want is None or got == want for got, want in zip(shape, sizes, strict=True))
    if not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name} has shape {shape}, expected ({wanted})")


def check_same_dtype(**tensors: Tensor) -> None:
    """Refuse tensors of different dtypes.

    Raises:
        ValueError: names every argument and its dtype.
    """
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        listed = ", ".join(f"{name}={tensor.dtype}" for name, tensor in tensors.items())
        raise ValueError(f"arguments must share one dtype, got {listed}")


def check_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Refuse a tensor of another dtype.

    Raises:
        ValueError: names the argument, its dtype and those expected.
    """
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")


def check_slots(slot_mapping_T: Tensor, num_slots: int) -> None:
    """Refuse a slot mapping that points outside a cache of num_slots rows.

    Raises:
        ValueError: names the lowest and the highest slot.
    """
    if slot_mapping_T.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in slot_mapping_T.aminmax())
    if lowest < 0 or highest >= num_slots:
        raise ValueError(f"slot_mapping_T has slots {lowest} to {highest}, outside 0 to {num_slots - 1}")


def check_one_device(**tensors: Tensor) -> None:
    """Refuse tensors that are not all on the CPU or all on one CUDA device.

    Raises:
        ValueError: names the argument, its device and the one expected.
    """
    (_, first), *_ = tensors.items()
    expected = first.device if first.is_cuda else torch.device("cpu")
    for name, tensor in tensors.items():
        if tensor.device != expected:
            raise ValueError(f"{name} is on {tensor.device}, expected {expected}")


def check_no_gradient(**tensors: Tensor) -> None:
    """Refuse tensors whose gradient would be lost in silence.

    Raises:
        ValueError: names the argument and the way out.
    """
    for name, tensor in tensors.items():
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, which this operation does not have on CUDA; call it under torch.no_grad()"
            )
