"""Payloads of the KV stream: every variant writes the same bytes, the same checksum, and finds what is not finite.

Shapes: K kv heads, T tokens, D head dim, N tokens of a prompt, S rows of a cache.
"""

from collections.abc import Iterator
from itertools import pairwise
from math import prod
from threading import Event, Thread

import pytest
import torch
import xxhash
from colm_kernels import native
from colm_kernels.kv_payload import scatter_rows, store_payload
from colm_kernels.native import use_variant
from torch import Tensor

from colm.wire.payload import write_payload

pytestmark = pytest.mark.kernels

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
# Payloads of 4 bytes to 1 MiB, around the 240 bytes, the stripes of 64 and the blocks of 1024 of the hash, and the
# chunks of 8 KiB.
SHAPES = [
    (1, 1, 1), (1, 30, 2), (1, 60, 1), (1, 61, 1), (3, 7, 5), (1, 64, 1), (1, 255, 1), (2, 128, 1), (1, 257, 1),
    (2, 31, 16), (2, 129, 4), (1, 1, 513), (2, 2049, 1), (8, 37, 64), (8, 512, 64),
]  # fmt: skip


@pytest.fixture(params=native.available_variants())
def variant(request: pytest.FixtureRequest) -> Iterator[native.Variant]:
    with use_variant(request.param):
        yield request.param


def tile(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """k_KTD and v_KTD, slices of a longer prompt's as the engine makes them."""
    num_heads, num_tokens, head_dim = shape
    generator = torch.Generator().manual_seed(prod(shape))
    k_KND, v_KND = (torch.randn(num_heads, num_tokens + 9, head_dim, generator=generator).to(dtype) for _ in range(2))
    return k_KND[:, 4 : 4 + num_tokens], v_KND[:, 4 : 4 + num_tokens]


def packed(k_KTD: Tensor, v_KTD: Tensor, start: int = 0) -> tuple[bytes, int, bool]:
    whole = torch.full((start + 2 * k_KTD.nbytes + 1,), 7, dtype=torch.uint8)
    checksum, is_finite = write_payload((k_KTD, v_KTD), whole[start:-1])
    assert whole[-1] == 7
    assert whole[:start].eq(7).all()
    return whole[start:-1].numpy().tobytes(), checksum, is_finite


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("start", [0, 3])
def test_a_payload_is_all_keys_then_all_values_and_their_checksum(
    shape: tuple[int, int, int], dtype: torch.dtype, start: int
) -> None:
    k_KTD, v_KTD = tile(shape, dtype)
    expected = torch.stack([k_KTD, v_KTD]).view(torch.uint8).numpy().tobytes()
    assert packed(k_KTD, v_KTD, start) == (expected, xxhash.xxh3_64_intdigest(expected), True)


@pytest.mark.usefixtures("variant")
def test_tokens_that_do_not_follow_each_other_are_packed_too() -> None:
    k_KTD, v_KTD = tile((2, 40, 8), torch.bfloat16)
    assert packed(k_KTD[:, ::2], v_KTD[:, ::2]) == packed(k_KTD[:, ::2].contiguous(), v_KTD[:, ::2].contiguous())


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_found_wherever_it_stands(dtype: torch.dtype, value: float) -> None:
    for half in range(2):
        for place in (0, 15, 16, 31, 100, -17, -1):
            both = [each.clone() for each in tile((3, 47, 5), dtype)]
            both[half].view(-1)[place] = value
            assert not packed(*both)[2]


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_and_the_least_numbers_are_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    numbers = torch.tensor([limits.max, limits.min, -0.0, limits.tiny], dtype=dtype).repeat(100).view(1, 20, 20)
    assert packed(numbers, numbers)[2]


def test_a_payload_of_another_length_is_refused() -> None:
    k_KTD, v_KTD = tile((2, 4, 8), torch.bfloat16)
    with pytest.raises(ValueError, match="out"):
        write_payload((k_KTD, v_KTD), torch.empty(2 * k_KTD.nbytes - 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="v_KTD"):
        write_payload((k_KTD, v_KTD[:, 1:]), torch.empty(2 * k_KTD.nbytes, dtype=torch.uint8))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_scattered_and_nothing_beside_them_is_touched(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x_KTD, _ = tile(shape, dtype)
    num_heads, num_tokens, head_dim = shape
    cache_SKD = torch.full((num_tokens + 2, num_heads, head_dim), 7.0, dtype=dtype)
    scatter_rows(x_KTD, cache_SKD[1:-1])
    assert torch.equal(cache_SKD[1:-1], x_KTD.transpose(0, 1))
    assert cache_SKD[0].eq(7).all()
    assert cache_SKD[-1].eq(7).all()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("num_runs", [1, 3])
def test_a_payload_is_stored_in_its_rows_and_nothing_beside_them_is_touched(
    shape: tuple[int, int, int], dtype: torch.dtype, start: int, num_runs: int
) -> None:
    """The runs lie backwards, with a row of their own before, between and behind them."""
    k_KTD, v_KTD = tile(shape, dtype)
    num_heads, num_tokens, head_dim = shape
    ends = [num_tokens * number // num_runs for number in range(num_runs + 1)]
    runs, rows = [], num_tokens + num_runs + 1
    for begin, end in pairwise(ends):
        rows -= end - begin + 1
        if end > begin:
            runs.append((end - begin, rows))
    payload = torch.empty(start + 2 * k_KTD.nbytes, dtype=torch.uint8)[start:]
    checksum, _ = write_payload((k_KTD, v_KTD), payload)
    shape = (num_tokens + num_runs + 1, num_heads, head_dim)
    stored = tuple(torch.full(shape, 7.0, dtype=dtype) for _ in range(2))
    expected = tuple(each.clone() for each in stored)
    first = 0
    for count, row in runs:
        for cache_SKD, tokens_KTD in zip(expected, (k_KTD, v_KTD), strict=True):
            cache_SKD[row : row + count] = tokens_KTD[:, first : first + count].transpose(0, 1)
        first += count
    found = store_payload(payload, *stored, runs)
    has_library = native.choose_rows_variant(*stored) != "torch" and payload.nbytes > 240
    assert found == (checksum if has_library else None)
    if has_library:
        assert all(torch.equal(*both) for both in zip(stored, expected, strict=True))


def test_the_checksum_is_of_what_was_stored_whoever_writes_meanwhile() -> None:
    """Payloads lie in memory that the sender can still write to."""
    payload = torch.zeros(2 * 8 * 512 * 128, dtype=torch.uint8)
    k_SKD, v_SKD = (torch.empty(512, 8, 64, dtype=torch.bfloat16) for _ in range(2))
    has_ended = Event()

    def write() -> None:
        while not has_ended.is_set():
            payload.add_(1)

    writer = Thread(target=write)
    writer.start()
    try:
        for _ in range(32):
            if (checksum := store_payload(payload, k_SKD, v_SKD, [(512, 0)])) is not None:
                assert checksum == packed(k_SKD.transpose(0, 1).contiguous(), v_SKD.transpose(0, 1).contiguous())[1]
    finally:
        has_ended.set()
        writer.join()


def test_a_payload_that_does_not_fit_its_rows_is_refused() -> None:
    rows_SKD = torch.empty(4, 2, 8, dtype=torch.bfloat16)
    payload = torch.empty(2 * 3 * 2 * 16, dtype=torch.uint8)
    for values, runs in ((rows_SKD, [(2, 0)]), (rows_SKD[:, :1], [(3, 0)]), (rows_SKD.float(), [(3, 0)])):
        with pytest.raises(ValueError, match="expected"):
            store_payload(payload, rows_SKD, values, runs)


def test_rows_that_do_not_fit_are_refused() -> None:
    x_KTD, _ = tile((2, 4, 8), torch.bfloat16)
    for rows in (torch.empty(3, 2, 8, dtype=torch.bfloat16), torch.empty(4, 2, 8)):
        with pytest.raises(ValueError, match="out_TKD"):
            scatter_rows(x_KTD, rows)
