"""Public operations hand tensors on CUDA to the GPU: tensors here have a device and shapes, but no data."""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from colm_kernels.chain_linear import chain_linear
from colm_kernels.gpu import chain_linear as chain_linear_on_gpu
from colm_kernels.gpu import dense
from colm_kernels.gpu import sparse_prefill_attention as sparse_on_gpu
from colm_kernels.native import CancelFlag, Cancelled
from colm_kernels.prefill_attention import prefill_attention
from colm_kernels.sparse_index import Tiling
from colm_kernels.sparse_prefill_attention import sparse_prefill_attention
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture(autouse=True)
def no_data() -> Iterator[None]:
    with FakeTensorMode():
        yield


def attention_inputs(dtype: torch.dtype, device: str = "cuda") -> list[torch.Tensor]:
    return [torch.empty(*shape, dtype=dtype, device=device) for shape in ((4, 4, 16), (2, 6, 16), (2, 6, 16))]


def staircase_inputs(dtype: torch.dtype) -> list[Any]:
    x, *weights = (torch.empty(*shape, dtype=dtype, device="cuda") for shape in ((3, 30), (8, 20), (4, 30)))
    return [x, weights, None, (3, 2)]


def index() -> Any:
    """A stand-in for `SparseIndex`, whose checks would read data."""
    return SimpleNamespace(tiling=Tiling(num_queries=4, num_keys=6), num_lists=2, device=torch.device("cuda:0"))


CASES = [
    (dense, "in_triton", partial(prefill_attention, backend="triton"), attention_inputs),
    (sparse_on_gpu, "sparse_prefill_attention", sparse_prefill_attention, lambda d: [*attention_inputs(d), index()]),
    (chain_linear_on_gpu, "chain_linear", chain_linear, staircase_inputs),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("module", "name", "operation", "inputs"), CASES, ids=[case[1] for case in CASES])
def test_tensors_on_cuda_go_to_the_gpu(module, name, operation, inputs, dtype, monkeypatch):
    monkeypatch.setattr(module, name, lambda *arguments: arguments)
    arguments = inputs(dtype)
    received = operation(*arguments)
    assert len(received) == len(arguments)
    for got, given in zip(received, arguments, strict=True):
        pairs = zip(got, given, strict=True) if isinstance(given, list) else [(got, given)]
        assert all(one is other for one, other in pairs)


def test_tensors_on_two_devices_are_refused_by_name():
    q, k, v = attention_inputs(torch.float32)
    with pytest.raises(ValueError, match="v_KSD is on cpu, expected cuda:0"):
        prefill_attention(q, k, attention_inputs(torch.float32, "cpu")[2])
    with pytest.raises(ValueError, match="k_KSD is on cuda:0, expected cpu"):
        prefill_attention(attention_inputs(torch.float32, "cpu")[0], k, v)
    x, weights, _, chain_rows = staircase_inputs(torch.float32)
    with pytest.raises(ValueError, match=r"weights\[1\] is on cpu, expected cuda:0"):
        chain_linear(x, [weights[0], torch.empty(4, 30)], None, chain_rows)


@pytest.mark.parametrize(
    "operation", [prefill_attention, lambda *qkv, **o: sparse_prefill_attention(*qkv, index(), **o)]
)
def test_a_set_flag_stops_the_launch(operation: Callable[..., Any]):
    flag = CancelFlag()
    flag.set()
    with pytest.raises(Cancelled):
        operation(*attention_inputs(torch.bfloat16), cancelled=flag)


def test_attention_refuses_tensors_whose_gradient_would_be_lost():
    q, k, v = attention_inputs(torch.float32)
    v.requires_grad_()
    with pytest.raises(ValueError, match="v_KSD requires a gradient"):
        prefill_attention(q, k, v)
    with pytest.raises(ValueError, match="v_KSD requires a gradient"):
        sparse_prefill_attention(q, k, v, index())


def test_a_dtype_that_no_kernel_multiplies_is_refused():
    with pytest.raises(ValueError, match="x_RI has dtype"):
        chain_linear(*staircase_inputs(torch.float64))
