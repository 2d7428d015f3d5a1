"""Dense prefill attention: every variant against the definition, within the budget of tolerance.py."""

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from colm_kernels import native, tolerance
from colm_kernels.native import CancelFlag, Cancelled, use_variant
from colm_kernels.prefill_attention import prefill_attention
from torch import Tensor

from tests.kernel_inputs import prefill_inputs as inputs

pytestmark = pytest.mark.kernels

ROW_BLOCK, KEY_BLOCK, CHUNK = 48, 256, 512  # prefill.h
DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture(params=native.available_variants())
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_variant(request.param):
        yield request.param


def assert_matches_definition(q: Tensor, k: Tensor, v: Tensor, **options) -> None:
    tolerance.check_all(tolerance.prefill_attention(q, k, v), prefill_attention(q, k, v, **options))


LENGTHS = (1, 2, ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 1, 61, KEY_BLOCK - 1, KEY_BLOCK, KEY_BLOCK + 1)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_whole_sequence_matches_at_lengths_around_the_blocks(length, dtype):
    assert_matches_definition(*inputs(length, length, 2, 1, 64, dtype))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 47, 48, 97])
@pytest.mark.parametrize("num_prefix", [1, 63, 64, 65, CHUNK - 1, CHUNK, 1009])
def test_tile_after_a_prefix_matches(num_queries, num_prefix, dtype):
    assert_matches_definition(*inputs(num_queries, num_prefix + num_queries, 2, 2, 16, dtype))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", native.HEAD_DIMS)
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_every_head_dim_matches(head_dim, num_kv_heads, dtype):
    assert_matches_definition(*inputs(101, 613, 2, num_kv_heads, head_dim, dtype))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_grouped_queries_read_their_own_kv_head(group):
    assert_matches_definition(*inputs(53, 130, 2 * group, 2, 16, torch.bfloat16))


@pytest.mark.usefixtures("variant")
def test_other_head_dims_run_in_pytorch():
    assert_matches_definition(*inputs(20, 33, 4, 2, 24, torch.float32))


@pytest.fixture(scope="module")
def many_items() -> tuple[tuple[Tensor, ...], tuple[tolerance.Expected, ...]]:
    """More rows than one item takes, so that several items share a kv head; and what is right."""
    case = inputs(1601, 1700, 2, 1, 16, torch.float32)
    return case, tolerance.prefill_attention(*case)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_many_items_on_any_number_of_threads_match(num_threads, many_items):
    case, expected = many_items
    tolerance.check_all(expected, prefill_attention(*case, num_threads=num_threads))


def test_slices_of_longer_buffers_are_read_in_place(variant):
    q, k, v = inputs(70, 300, 4, 2, 64, torch.bfloat16)
    expected = prefill_attention(q, k, v)
    # The engine's layout: token-major storage with room for more tokens, seen kv-head major; queries inside a
    # wider projection. What lies beside the slices must not be read.
    storage = torch.full((2, 400, 2, 64), float("nan"), dtype=torch.bfloat16)
    storage[0, :300], storage[1, :300] = k.transpose(0, 1), v.transpose(0, 1)
    wide_q = torch.full((70, 8, 64), float("nan"), dtype=torch.bfloat16)
    wide_q[:, 2:6] = q
    k_view, v_view = (storage[i, :300].transpose(0, 1) for i in (0, 1))
    out, lse = prefill_attention(wide_q[:, 2:6], k_view, v_view)
    for result, of_copy, budget in zip((out, lse), expected, tolerance.prefill_attention(q, k, v), strict=True):
        budget.check(result)
        if variant != "torch":  # SDPA may sum in another order for other strides
            assert torch.equal(result, of_copy)


@pytest.mark.usefixtures("variant")
def test_future_keys_are_never_seen():
    q, k, v = inputs(50, 90, 2, 1, 16, torch.float32)
    out, lse = prefill_attention(q, k, v)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, 61:], changed_v[:, 61:] = 100.0, 1e6  # keys 0 .. 60 are what query 20 and before see
    changed, changed_lse = prefill_attention(q, changed_k, changed_v)
    assert torch.equal(out[:21], changed[:21])
    assert torch.equal(lse[:21], changed_lse[:21])
    assert not torch.equal(out[21], changed[21])


@pytest.mark.usefixtures("variant")
def test_lse_merges_two_halves_of_the_keys():
    q, k, v = inputs(1, 300, 2, 2, 64, torch.float32)
    parts = [prefill_attention(q, k[:, part], v[:, part]) for part in (slice(0, 100), slice(100, 300))]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * (part_lse - lse).exp().unsqueeze(-1) for out, part_lse in parts)
    tolerance.check_all(tolerance.prefill_attention(q, k, v), (merged, lse))


@pytest.mark.usefixtures("variant")
def test_scores_far_apart_neither_overflow_nor_vanish():
    q, k, v = inputs(40, 600, 1, 1, 64, torch.float32)
    q, k = q * 40, k * 40
    assert_matches_definition(q, k, v)


@pytest.mark.usefixtures("variant")
def test_what_the_first_key_gave_does_not_fade_over_many_blocks_of_lesser_keys():
    """Bug: 2^0 was 0.99999994 in the library, so each block of keys took that much off all before it.

    The first and the last key share the weight, the others have none: output and log-sum-exp have two terms.
    """
    num_keys = 256 * KEY_BLOCK
    q, k = torch.ones(1, 1, 16), torch.full((1, num_keys, 16), -30.0)
    k[:, [0, -1]] = 0
    v = torch.zeros(1, num_keys, 16)
    v[:, 0], v[:, -1] = 1, -1
    assert_matches_definition(q, k, v)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_the_rows_that_see_them(value, dtype):
    q, k, v = inputs(100, 700, 2, 1, 64, dtype)
    k[0, 650, 3] = value
    v[0, 3, 5] = value
    out, _ = prefill_attention(q, k, v)
    assert not out[:, :, 5].isfinite().any()
    # Query 50 is the first to see key 650; queries of an earlier block must not know of it.
    assert out[:48, :, :5].isfinite().all()


@pytest.mark.usefixtures("variant")
def test_no_queries_give_empty_results():
    out, lse = prefill_attention(torch.empty(0, 2, 16), torch.randn(1, 5, 16), torch.randn(1, 5, 16))
    assert out.shape == (0, 2, 16)
    assert lse.shape == (0, 2)


def test_python_threads_may_call_at_once(variant):
    cases = [inputs(200, 500 + i, 4, 2, 16, torch.float32) for i in range(4)]
    expected = [tolerance.prefill_attention(*case)[0] for case in cases]
    results: dict[int, list[Tensor]] = {}

    def work(i: int) -> None:
        with use_variant(variant):
            results[i] = [prefill_attention(*cases[i], num_threads=1 + n % 3)[0] for n in range(10)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, outs in results.items():
        for out in outs:
            expected[i].check(out)
    assert len(results) == 4


@pytest.mark.usefixtures("variant")
def test_a_set_flag_stops_the_call():
    flag = CancelFlag()
    case = inputs(300, 300, 2, 1, 16, torch.float32)
    prefill_attention(*case, cancelled=flag)
    flag.set()
    assert flag.is_set()
    with pytest.raises(Cancelled):
        prefill_attention(*case, cancelled=flag)


@pytest.mark.parametrize("name", [name for name in native.available_variants() if name != "torch"])
def test_a_flag_set_by_another_thread_stops_a_long_call_between_blocks(name):
    flag = CancelFlag()
    q, k, v = inputs(65536, 65536, 4, 1, 16, torch.float32)  # seconds, however busy or fast the machine is
    timer = threading.Timer(0.02, flag.set)
    timer.start()
    with use_variant(name), pytest.raises(Cancelled):
        prefill_attention(q, k, v, num_threads=2, cancelled=flag)
    timer.join()


@pytest.mark.parametrize("name", [name for name in native.available_variants() if name != "torch"])
@pytest.mark.parametrize("shape", [(1, 1), (47, 47), (5, 2000), (300, 1111)])
def test_a_flag_says_that_a_call_is_wholly_done_and_nothing_once_it_is_rewound(name, shape):
    flag = CancelFlag()
    for _ in range(2):  # the second call counts from the start
        with use_variant(name):
            prefill_attention(*inputs(*shape, 4, 2, 16, torch.float32), num_threads=2, cancelled=flag)
        assert flag.done_share == pytest.approx(1, abs=1e-6)
        assert flag.done_share <= 1
    flag.rewind()
    assert flag.done_share == 0
    assert not flag.is_set()


@pytest.mark.parametrize("name", [name for name in native.available_variants() if name != "torch"])
def test_another_thread_sees_how_far_a_long_call_is(name):
    flag, seen = CancelFlag(), []
    tensors = inputs(65536, 65536, 4, 1, 16, torch.float32)  # seconds, however busy or fast the machine is

    def attend():
        with use_variant(name):
            prefill_attention(*tensors, num_threads=2, cancelled=flag)

    with ThreadPoolExecutor() as threads:
        call = threads.submit(attend)
        while not call.done() and len(set(seen)) < 5:
            seen.append(flag.done_share)
        flag.set()
        with pytest.raises(Cancelled):
            call.result()
    assert len(set(seen)) == 5
    assert seen == sorted(seen)
    assert seen[-1] < flag.done_share + 1e-9 < 1, "what is given up is not done"


def test_gradients_still_flow_through_pytorch():
    q, k, v = inputs(8, 8, 1, 1, 16, torch.float32)
    q.requires_grad_()
    prefill_attention(q, k, v)[0].sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "q_THD has shape"),
        (lambda q, k, v: (q, k[..., :8], v), "k_KSD has shape"),
        (lambda q, k, v: (q, k, v[:, :5]), "v_KSD has shape"),
        (lambda q, k, v: (q, k, v.bfloat16()), "v_KSD=torch.bfloat16"),
        (lambda q, k, v: (q.half(), k.half(), v.half()), "q_THD has dtype"),
        (lambda q, k, v: (q[:, :3], k, v), "q_THD has 3 heads"),
        (lambda q, k, v: (q, k[:, :3], v[:, :3]), "k_KSD has 3 keys"),
        (lambda q, k, v: (q, k.transpose(1, 2).contiguous().transpose(1, 2), v), "k_KSD has strides"),
        (lambda q, k, v: (q.to("meta"), k, v), "q_THD is on meta"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    arguments = change(*inputs(4, 6, 4, 2, 16, torch.float32))
    with pytest.raises(ValueError, match=message):
        prefill_attention(*arguments)


def test_num_threads_below_one_is_refused():
    with pytest.raises(ValueError, match="num_threads=0"):
        prefill_attention(*inputs(4, 6, 4, 2, 16, torch.float32), num_threads=0)


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="sse2"), use_variant("sse2"):
        pass


def test_where_there_is_a_compiler_the_library_is_there():
    """A library that failed to build must fail a test, since its own tests are then not collected."""
    assert shutil.which("g++") is None or native.built_hash(native.LIBRARY_PATH) == native.source_hash()
