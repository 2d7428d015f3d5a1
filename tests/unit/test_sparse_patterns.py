"""Patterns of sparse attention: each lists all keys that it must cover, and no block without one."""

import pytest
import torch
from colm_kernels import sparse_estimate
from colm_kernels.sparse_estimate import vertical_slash_mass
from colm_kernels.sparse_index import SparseIndex, Tiling
from colm_kernels.sparse_patterns import (
    a_shape,
    block_sparse,
    blocks_at_distances,
    top_p,
    vertical_slash,
)
from colm_kernels.steps import all_at_once
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.tilings import positions, tilings


def distances(tiling: Tiling) -> Tensor:
    """How far each key lies behind each query: [T, S]; negative in the future."""
    return positions(tiling).unsqueeze(1) - torch.arange(tiling.num_keys)


def by_block(tiling: Tiling, pairs_LTS: Tensor) -> Tensor:
    """Whether any pair of a (row block, key block) is set: [L, N, B]."""
    num_lists = len(pairs_LTS)
    padded = torch.zeros(
        num_lists,
        tiling.num_row_blocks * tiling.row_block,
        tiling.num_key_blocks * tiling.key_block,
        dtype=torch.bool,
    )
    padded[:, : tiling.num_queries, : tiling.num_keys] = pairs_LTS
    blocks = padded.unflatten(2, (-1, tiling.key_block)).any(dim=3)
    return blocks.unflatten(1, (-1, tiling.row_block)).any(dim=2)


def listed_blocks(index: SparseIndex) -> Tensor:
    """[L, N, B], without block 0 and the diagonal, which every list holds."""
    tiling = index.tiling
    listed = torch.zeros(index.num_lists * tiling.num_row_blocks, tiling.num_key_blocks, dtype=torch.bool)
    lists = torch.repeat_interleave(torch.arange(len(listed)), index.block_offsets.diff())
    listed[lists, index.block_ids.long()] = True
    return listed.view(index.num_lists, tiling.num_row_blocks, -1) & ~always(tiling)


def always(tiling: Tiling) -> Tensor:
    first_N, _ = tiling.diagonal()
    block_B = torch.arange(tiling.num_key_blocks)
    return (block_B == 0) | (block_B >= first_N.unsqueeze(1))


def assert_covers_without_waste(index: SparseIndex, wanted_LTS: Tensor) -> None:
    """Every wanted pair is attended to, and every block that a list need not hold has a wanted pair."""
    assert (index.mask() | ~wanted_LTS).all()
    assert not (listed_blocks(index) & ~by_block(index.tiling, wanted_LTS)).any()


@given(tilings(), st.integers(0, 300), st.integers(1, 300))
def test_a_shape_covers_sinks_and_the_local_window(tiling, sink_tokens, local_tokens):
    distance_TS = distances(tiling)
    wanted_TS = (distance_TS >= 0) & ((distance_TS < local_tokens) | (torch.arange(tiling.num_keys) < sink_tokens))
    index = a_shape(tiling, num_lists=2, sink_tokens=sink_tokens, local_tokens=local_tokens)
    assert_covers_without_waste(index, wanted_TS.expand(2, -1, -1))


@given(tilings(), st.integers(1, 3), st.integers(0, 40), st.integers(0, 12), st.integers(0, 1 << 30))
def test_vertical_slash_covers_every_column_and_diagonal(tiling, num_lists, num_verticals, num_slashes, seed):
    generator = torch.Generator().manual_seed(seed)
    verticals = torch.randint(-2, tiling.num_keys, (num_lists, num_verticals), generator=generator)
    # Distances past the first key ask for nothing.
    slashes = torch.randint(-2, 2 * tiling.num_keys, (num_lists, num_slashes), generator=generator)
    distance_TS = distances(tiling)
    of_slashes = torch.stack([torch.isin(distance_TS, s[s >= 0]) for s in slashes]) & (distance_TS >= 0)
    of_verticals = torch.stack([torch.isin(torch.arange(tiling.num_keys), v) for v in verticals])
    index = vertical_slash(tiling, verticals_LV=verticals, slashes_LW=slashes)
    assert_covers_without_waste(index, of_slashes)
    assert (index.mask() | ~(of_verticals.unsqueeze(1) & (distance_TS >= 0))).all()
    columns = {int(column) for column in index.column_ids}
    assert columns <= set(verticals.flatten().tolist())


@given(tilings(), st.lists(st.tuples(st.integers(0, 900), st.integers(0, 200)), max_size=6))
def test_ranges_of_distances_mark_the_blocks_of_their_keys_and_no_other(tiling, ranges):
    nearest, farthest = [near for near, _ in ranges], [near + width for near, width in ranges]
    blocks = blocks_at_distances(
        tiling.first_positions(),
        tiling.last_positions(),
        torch.tensor([[-1, *nearest]]),
        torch.tensor([[-1, *farthest]]),
        num_key_blocks=tiling.num_key_blocks,
        key_block=tiling.key_block,
    )
    distance_TS = distances(tiling)
    wanted_TS = torch.zeros_like(distance_TS, dtype=torch.bool)
    for near, far in zip(nearest, farthest, strict=True):
        wanted_TS |= (distance_TS >= near) & (distance_TS <= far)
    assert torch.equal(blocks, by_block(tiling, wanted_TS[None]))


@given(tilings(), st.integers(1, 12), st.integers(0, 1 << 30))
def test_block_sparse_lists_the_best_blocks(tiling, num_blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, tiling.num_row_blocks, tiling.num_key_blocks, generator=generator)
    listed = listed_blocks(block_sparse(tiling, scores, num_blocks=num_blocks))
    elective = (~always(tiling)).expand_as(scores)
    counts = listed.sum(dim=2)
    assert torch.equal(counts, elective.sum(dim=2).clamp_max(num_blocks))
    worst_listed = scores.masked_fill(~listed, float("inf")).amin(dim=2)
    best_left = scores.masked_fill(~elective | listed, float("-inf")).amax(dim=2)
    assert (worst_listed >= best_left).all()


@given(tilings(), st.floats(0, 1), st.integers(0, 1 << 30))
def test_top_p_reaches_its_share_with_the_fewest_blocks(tiling, p, seed):
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(2, tiling.num_row_blocks, tiling.num_key_blocks, generator=generator, dtype=torch.float64) ** 4
    listed = listed_blocks(top_p(tiling, mass, p=p))
    _, last_N = tiling.diagonal()
    visible = mass * (torch.arange(tiling.num_key_blocks) <= last_N.unsqueeze(1))
    total = visible.sum(dim=2)
    reached = (visible * (listed | always(tiling))).sum(dim=2)
    slack = 1e-12 * total
    assert (reached >= p * total - slack).all()
    smallest = visible.masked_fill(~listed, float("inf")).amin(dim=2)
    assert ((reached - smallest < p * total + slack) | ~listed.any(dim=2)).all()


def test_vertical_slash_mass_is_the_attention_of_the_last_rows():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(150, 4, 16, generator=generator), torch.randn(2, 333, 16, generator=generator)
    vertical, slash = all_at_once(vertical_slash_mass(q, k, num_lists=4, num_rows=10))
    distance_TS = distances(Tiling(num_queries=10, num_keys=333))
    for head in range(4):
        scores = (q[-10:, head] @ k[head // 2].T / 4).masked_fill(distance_TS < 0, float("-inf"))
        weights = scores.softmax(dim=1)
        torch.testing.assert_close(vertical[head], weights.sum(dim=0))
        expected = torch.stack([weights[distance_TS == distance].sum() for distance in range(333)])
        torch.testing.assert_close(slash[head], expected)
    by_kv_head, _ = all_at_once(vertical_slash_mass(q, k, num_lists=2, num_rows=10))
    torch.testing.assert_close(by_kv_head[1], vertical[2] + vertical[3])


def test_a_few_rows_at_a_time_add_up_to_the_same_mass(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(64, 4, 16, generator=generator), torch.randn(2, 500, 16, generator=generator)
    at_once = all_at_once(vertical_slash_mass(q, k, num_lists=2))
    monkeypatch.setattr(sparse_estimate, "SCORES_AT_ONCE", 7 * 500)
    for few, whole in zip(all_at_once(vertical_slash_mass(q, k, num_lists=2)), at_once, strict=True):
        torch.testing.assert_close(few, whole)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda t: a_shape(t, num_lists=1, sink_tokens=-1, local_tokens=5), "sink_tokens=-1"),
        (lambda t: a_shape(t, num_lists=1, sink_tokens=0, local_tokens=0), "local_tokens=0"),
        (lambda t: vertical_slash(t, verticals_LV=torch.zeros(2, 1), slashes_LW=torch.zeros(1, 1)), "verticals_LV has"),
        (lambda t: block_sparse(t, torch.zeros(1, 1, 2), num_blocks=0), "num_blocks=0"),
        (lambda t: block_sparse(t, torch.zeros(1, 1, 3), num_blocks=1), "scores have shape"),
        (lambda t: top_p(t, torch.zeros(1, 1, 2), p=1.5), "p=1.5"),
        (
            lambda _: all_at_once(vertical_slash_mass(torch.zeros(9, 4, 16), torch.zeros(2, 9, 16), num_lists=3)),
            "num_lists=3",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build(Tiling(num_queries=10, num_keys=100))
