"""The adapter to flash-attn, against a stand-in with the package's signature that computes by definition.

Shapes: as in the adapter; B a batch of one.
"""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from colm_kernels.gpu import dense, flash_attn_adapter
from colm_kernels.gpu import prefill_attention as in_triton
from colm_kernels.prefill_attention import check_backend, prefill_attention, prefill_attention_reference
from torch import Tensor


class FlashAttn(ModuleType):
    """flash_attn 2.x: [B, tokens, heads, D], causal at the bottom right, LSE [B, heads, tokens]."""

    def __init__(self, version: str = "2.8.3") -> None:
        super().__init__("flash_attn")
        self.__version__ = version
        self.num_calls = 0

    def flash_attn_func(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        self.num_calls += 1
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert q.dim() == k.dim() == v.dim() == 4
        assert q.shape[0] == k.shape[0] == v.shape[0] == 1
        assert k.shape == v.shape
        assert q.shape[2] % k.shape[2] == 0
        assert (dropout_p, softmax_scale, causal, window_size, softcap) == (0.0, None, True, (-1, -1), 0.0)
        assert (alibi_slopes, deterministic, return_attn_probs) == (None, False, True)
        assert all(tensor.stride(-1) == 1 for tensor in (q, k, v))
        out, lse = prefill_attention_reference(q[0], k[0].transpose(0, 1), v[0].transpose(0, 1))
        return out[None], lse.T[None].contiguous(), None


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Clear the cache: the adapter looks for the installed package once a process."""
    flash_attn_adapter._flash_attn_func.cache_clear()
    yield
    flash_attn_adapter._flash_attn_func.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, stand_in: ModuleType | None) -> None:
    """Beside a GPU; None makes the import fail."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> FlashAttn:
    stand_in = FlashAttn()
    install(monkeypatch, stand_in)
    return stand_in


def inputs(num_queries, num_keys, num_heads, num_kv_heads, head_dim, dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_queries)
    return (
        torch.randn(num_queries, num_heads, head_dim, generator=generator).to(dtype),
        torch.randn(num_kv_heads, num_keys, head_dim, generator=generator).to(dtype),
        torch.randn(num_kv_heads, num_keys, head_dim, generator=generator).to(dtype),
    )


def test_dense_attention_runs_in_flash_attn_where_it_is_there(flash_attn):
    arguments = inputs(5, 12, 6, 2, 16, torch.float16)
    out, lse = dense.prefill_attention(*arguments)
    expected_out, expected_lse = prefill_attention_reference(*arguments)
    assert flash_attn.num_calls == 1
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize(("head_dim", "dtype"), [(16, torch.float32), (12, torch.float16)])
def test_what_flash_attn_does_not_take_runs_in_triton(head_dim, dtype, flash_attn):
    arguments = inputs(5, 12, 2, 1, head_dim, dtype)
    assert torch.equal(dense.prefill_attention(*arguments)[0], in_triton.prefill_attention(*arguments)[0])
    assert flash_attn.num_calls == 0


@pytest.mark.parametrize("stand_in", [FlashAttn("2.0.9"), None], ids=["too old", "not installed"])
def test_without_a_flash_attn_that_aligns_its_mask_triton_runs(stand_in, monkeypatch):
    install(monkeypatch, stand_in)
    arguments = inputs(5, 12, 2, 1, 16, torch.float16)
    assert torch.equal(dense.prefill_attention(*arguments)[0], in_triton.prefill_attention(*arguments)[0])
    assert stand_in is None or stand_in.num_calls == 0


def test_without_a_gpu_the_package_is_not_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", FlashAttn())
    assert flash_attn_adapter.why_not(torch.float16, 16) == "flash-attn needs a GPU, and PyTorch finds none"


def test_triton_runs_where_it_is_asked_for(flash_attn):
    arguments = inputs(5, 12, 6, 2, 16, torch.float16)
    assert torch.equal(dense.prefill_attention(*arguments, "triton")[0], in_triton.prefill_attention(*arguments)[0])
    assert flash_attn.num_calls == 0


@pytest.mark.parametrize(
    ("stand_in", "head_dim", "dtype", "reason"),
    [
        (FlashAttn(), 16, torch.float32, r"float16 and bfloat16, not torch\.float32"),
        (FlashAttn(), 12, torch.float16, "multiples of 8 up to 256, not 12"),
        (FlashAttn("2.0.9"), 16, torch.float16, r"2\.0\.9 is older than 2\.1"),
        (None, 16, torch.float16, "cannot be imported: .*"),
    ],
    ids=["dtype", "head dim", "too old", "not installed"],
)
def test_a_flash_attn_that_cannot_run_is_refused_with_the_reason(stand_in, head_dim, dtype, reason, monkeypatch):
    """Only "auto" may choose another one; whoever names a backend measures or trusts that one."""
    install(monkeypatch, stand_in)
    with pytest.raises(ValueError, match=f"backend='flash_attn': flash-attn .*{reason}; use 'auto' or 'triton'"):
        check_backend("flash_attn", torch.device("cuda", 0), dtype, head_dim)
    check_backend("auto", torch.device("cuda", 0), dtype, head_dim)


@pytest.mark.parametrize("backend", ["flash_attn", "triton"])
def test_a_backend_of_gpus_is_refused_on_the_cpu(backend):
    with pytest.raises(ValueError, match=f"backend='{backend}' runs on CUDA alone, and this is cpu; use 'auto'"):
        prefill_attention(*inputs(5, 12, 2, 1, 16, torch.float32), backend=backend)


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match="backend='cudnn' is unknown; use one of auto, flash_attn, triton"):
        check_backend("cudnn", torch.device("cuda", 0), torch.float16, 16)
