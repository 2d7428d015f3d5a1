"""Adapters to flash-attn and minference, against stand-ins with the packages' signatures that compute by definition.

Shapes: as in the adapters; B a batch of one.
"""

import math
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from colm_kernels.gpu import dense, flash_attn_adapter, minference_adapter
from colm_kernels.gpu import prefill_attention as in_triton
from colm_kernels.prefill_attention import prefill_attention_reference
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


class MInference(ModuleType):
    """minference 0.1: [B, H, tokens, D] with a key head for every query head, no LSE."""

    def __init__(self) -> None:
        super().__init__("minference")

    def vertical_slash_sparse_attention(self, query, key, value, v_idx, s_idx, block_size_M=64, block_size_N=64):
        assert query.shape == key.shape == value.shape
        assert (block_size_M, block_size_N) == (64, 64)
        batch_size, num_heads, num_tokens, head_dim = query.shape
        assert batch_size == 1
        v_idx, s_idx = (idx.reshape(batch_size, num_heads, -1)[0].long() for idx in (v_idx, s_idx))
        distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
        seen = torch.zeros(num_heads, num_tokens, num_tokens, dtype=torch.bool)
        for head in range(num_heads):
            seen[head] = torch.isin(distance, s_idx[head])
            seen[head, :, v_idx[head]] = True
        scores = query[0].float() @ key[0].float().transpose(1, 2) / math.sqrt(head_dim)
        scores.masked_fill_(~(seen & (distance >= 0)), float("-inf"))
        return (scores.softmax(dim=-1) @ value[0].float()).to(query.dtype)[None]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Clear the caches: the adapters look up installed packages once a process."""
    caches = (flash_attn_adapter.flash_attn_func, minference_adapter.vertical_slash_sparse_attention)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, name: str, stand_in: ModuleType | None) -> None:
    """Install a stand-in for the package, and a GPU; None makes the import fail."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, name, stand_in)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> FlashAttn:
    stand_in = FlashAttn()
    install(monkeypatch, "flash_attn", stand_in)
    return stand_in


@pytest.fixture
def minference(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "minference", MInference())


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
    install(monkeypatch, "flash_attn", stand_in)
    arguments = inputs(5, 12, 2, 1, 16, torch.float16)
    assert torch.equal(dense.prefill_attention(*arguments)[0], in_triton.prefill_attention(*arguments)[0])
    assert stand_in is None or stand_in.num_calls == 0


def test_without_a_gpu_no_package_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", FlashAttn())
    monkeypatch.setitem(sys.modules, "minference", MInference())
    assert not flash_attn_adapter.takes(inputs(1, 1, 1, 1, 16, torch.float16)[0])
    assert not minference_adapter.is_available()


@pytest.mark.usefixtures("minference")
def test_vertical_slash_reads_the_kv_head_of_each_query_head_at_columns_and_diagonals():
    q, k, v = inputs(20, 20, 4, 2, 16, torch.float16)
    verticals, slashes = (
        torch.tensor([[0, 3], [1, 2], [5, 4], [19, 0]]),
        torch.tensor([[0, 7], [1, 0], [0, 19], [2, 0]]),
    )
    out = minference_adapter.vertical_slash_attention(q, k, v, verticals.int(), slashes.int())
    for head in range(4):
        for token in range(20):
            keys = sorted({*verticals[head].tolist(), *(token - slashes[head]).tolist()} & set(range(token + 1)))
            scores = q[token, head].float() @ k[head // 2, keys].float().T / 4
            torch.testing.assert_close(out[token, head], (scores.softmax(-1) @ v[head // 2, keys].float()).half())


@pytest.mark.usefixtures("minference")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, a, b: (q[:5], k, v, a, b), "k_KTD has shape"),
        (lambda q, k, v, a, b: (q.float(), k, v, a, b), "q_THD has dtype"),
        (lambda q, k, v, a, b: (q, k, v, a[:1], b), "verticals_HV has shape"),
        (lambda q, k, v, a, b: (q, k, v, a.long(), b), "verticals_HV has dtype"),
        (lambda q, k, v, a, b: (q, k, v, a, b + 1), "lacks distance 0"),
    ],
)
def test_what_minference_does_not_take_is_refused_by_name(change, message):
    ones = torch.ones(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        minference_adapter.vertical_slash_attention(*change(*inputs(6, 6, 2, 2, 16, torch.float16), ones, ones * 0))
