"""Estimates of where attention goes, from a few products; `sparse_patterns` takes them as masses and scores.

Shapes: T queries of the tile, S keys (prefix and tile), H query heads, K kv heads, G = H / K, D head dim, L lists (K or
H), R rows of one query head, C keys at a time, B blocks of `SCORE_BLOCK` keys, X = S + R.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from colm_kernels.native import Variant, call, choose_variant, dtype_id, resolve_num_threads
from colm_kernels.prefill_attention import check_prefill
from colm_kernels.steps import Steps

SCORES_AT_ONCE = 1 << 20
"""Scores of a step: a millisecond's work. PyTorch holds them meanwhile, 4 MiB."""
SCORE_BLOCK = 64
"""Keys whose scores are added up together; `kScoreBlock` of abi.h."""
_ITEM_KEYS = 1024
"""`kScoreItemKeys` of abi.h."""


class RowScoresArgs(ctypes.Structure):
    """`RowScoresArgs` of abi.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "positions")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_keys", "head_dim", "k_stride", "begin", "end")),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        *(
            (name, ctypes.c_void_p)
            for name in ("maximum", "sum", "lse", "vertical", "diagonal", "by_key", "by_diagonal")
        ),
        *((name, ctypes.c_int64) for name in ("num_first", "num_nearest")),
    )


def block_scores(q_RD: Tensor, k_SD: Tensor, position_R: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Each row's largest score, and the sum over exp(score - largest), in each block of some keys.

    Args:
        q_RD: rotated queries, contiguous.
        k_SD: rotated keys of their kv head.
        position_R: int64, descending, on the device of the keys; a row sees the keys up to its own position.
        begin: first key, at a block.
        end: after the last key, at a block or S.

    Returns:
        (maximum_RB, sum_RB) in fp32; where a row sees nothing of a block, the sum is 0.
    """
    variant = choose_variant(q_RD.shape[1], q_RD, k_SD) if q_RD.is_cpu else "torch"
    if variant == "torch":
        scores_RC = _scores(q_RD, k_SD, position_R, begin, end)
        scores_RBC = F.pad(scores_RC, (0, -scores_RC.shape[1] % SCORE_BLOCK), value=float("-inf"))
        scores_RBC = scores_RBC.unflatten(1, (-1, SCORE_BLOCK))
        maximum_RB = scores_RBC.amax(dim=2).clamp_min_(torch.finfo(torch.float32).min)
        return maximum_RB, (scores_RBC - maximum_RB.unsqueeze(2)).exp_().sum(dim=2)
    maximum_BR = torch.empty(-(-(end - begin) // SCORE_BLOCK), len(q_RD))
    sum_BR = torch.empty_like(maximum_BR)
    args = _args(q_RD, k_SD, position_R, begin, end, maximum=maximum_BR.data_ptr(), sum=sum_BR.data_ptr())
    _call(args, variant)
    return maximum_BR.T * q_RD.shape[1] ** -0.5, sum_BR.T


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sums:
    """Weights added up over the rows, and which of them count how much."""

    column_S: Tensor
    """By key."""
    diagonal_X: Tensor
    """By diagonal; longer by an item, since whole items may reach past the last diagonal, with nothing."""
    by: tuple[Tensor, Tensor] | None
    """A weight is divided by what its key has in the first and its diagonal in the second together; None leaves it."""
    num_first: int
    num_nearest: int


class LastRows:
    """The attention of a prompt's last rows, those of one query head, to all keys, some at a time.

    Rows are held last first. Then the row of number r and the key of number s are S - 1 - (r + s) apart: entries of a
    distance have the same sum of numbers, and stand on one diagonal. A key in a row's future is at a negative distance.

    Args:
        q_RD: rotated queries.
        k_SD: rotated keys of their kv head; the last R are the rows' own.
    """

    def __init__(self, q_RD: Tensor, k_SD: Tensor) -> None:
        self.num_rows, self.num_keys = len(q_RD), len(k_SD)
        self._q_RD = q_RD.flip(0).contiguous()
        self._k_SD = k_SD
        self._position_R = torch.arange(self.num_keys - 1, self.num_keys - 1 - self.num_rows, -1, device=k_SD.device)
        self._lse_R = torch.empty(0)
        self._variant: Variant = choose_variant(q_RD.shape[1], q_RD, k_SD) if q_RD.is_cpu else "torch"

    def normalise(self) -> Steps[None]:
        """To be run before the others: each row's sum over its keys."""
        lse_R = torch.full((self.num_rows,), float("-inf"), device=self._k_SD.device)
        for begin, end in self._ranges():
            maximum_RB, sum_RB = block_scores(self._q_RD, self._k_SD, self._position_R, begin, end)
            lse_R = lse_R.logaddexp((maximum_RB + sum_RB.log()).logsumexp(dim=1))
            yield
        self._lse_R = lse_R

    def masses(self) -> Steps[tuple[Tensor, Tensor]]:
        """Attention by key and by diagonal: (vertical_S, diagonal_X) in fp32, summed over the rows."""
        return (yield from self._added_up(None, 0, 0))

    def quotients(
        self, vertical_S: Tensor, diagonal_X: Tensor, *, num_first: int, num_nearest: int
    ) -> Steps[tuple[Tensor, Tensor]]:
        """The same of each weight divided by what its key and its diagonal have together.

        Args:
            vertical_S: of the keys; above 0.
            diagonal_X: of the diagonals; above 0.
            num_first: keys at the start that do not count.
            num_nearest: keys nearest to a row, its own among them, that do not count.
        """
        return (yield from self._added_up((vertical_S, diagonal_X), num_first, num_nearest))

    def _added_up(
        self, by: tuple[Tensor, Tensor] | None, num_first: int, num_nearest: int
    ) -> Steps[tuple[Tensor, Tensor]]:
        num_diagonals, device = self.num_keys + self.num_rows, self._k_SD.device
        sums = _Sums(
            column_S=torch.zeros(self.num_keys, device=device),
            diagonal_X=torch.zeros(num_diagonals + _ITEM_KEYS, device=device),
            by=by,
            num_first=num_first,
            num_nearest=num_nearest,
        )
        add_up = self._add_up if self._variant == "torch" else self._add_up_in_library
        for begin, end in self._ranges():
            add_up(sums, begin, end)
            yield
        return sums.column_S, sums.diagonal_X[:num_diagonals]

    def _add_up(self, sums: _Sums, begin: int, end: int) -> None:
        scores_RC = _scores(self._q_RD, self._k_SD, self._position_R, begin, end)
        weights_RC = scores_RC.sub_(self._lse_R.unsqueeze(1)).exp_()
        num_rows, num_keys = weights_RC.shape
        if begin < sums.num_first:
            weights_RC[:, : sums.num_first - begin] = 0.0
        if sums.num_nearest:
            number_C = torch.arange(begin, end, device=weights_RC.device)
            weights_RC.masked_fill_(number_C > self._position_R.unsqueeze(1) - sums.num_nearest, 0.0)
        if sums.by is not None:
            vertical_S, of_diagonal_X = sums.by
            at = of_diagonal_X.storage_offset() + begin
            weights_RC /= of_diagonal_X.as_strided((num_rows, num_keys), (1, 1), at) + vertical_S[begin:end]
        sums.column_S[begin:end] = weights_RC.sum(dim=0)
        padded_RX = F.pad(weights_RC, (0, num_rows))
        width = num_keys + num_rows - 1
        # A row's entries one place further on than those of the row before: diagonals stand below one another.
        sums.diagonal_X[begin : begin + width] += padded_RX.as_strided((num_rows, width), (width, 1)).sum(dim=0)

    def _add_up_in_library(self, sums: _Sums, begin: int, end: int) -> None:
        num_items = -(-(end - begin) // _ITEM_KEYS)
        of_items_IX = torch.empty(num_items, _ITEM_KEYS + self.num_rows)
        args = _args(
            self._q_RD,
            self._k_SD,
            self._position_R,
            begin,
            end,
            lse=self._lse_R.data_ptr(),
            vertical=None if sums.by is None else sums.by[0].data_ptr(),
            diagonal=None if sums.by is None else sums.by[1].data_ptr(),
            by_key=sums.column_S.data_ptr(),
            by_diagonal=of_items_IX.data_ptr(),
            num_first=sums.num_first,
            num_nearest=sums.num_nearest,
        )
        _call(args, self._variant)
        sums.diagonal_X[begin : begin + num_items * _ITEM_KEYS] += of_items_IX[:, :_ITEM_KEYS].flatten()
        # What reaches into the next item's diagonals; rows are fewer than an item's keys.
        shape, at = (num_items, self.num_rows), begin + _ITEM_KEYS
        sums.diagonal_X.as_strided(shape, (_ITEM_KEYS, 1), at).add_(of_items_IX[:, _ITEM_KEYS:])

    def _ranges(self) -> Iterator[tuple[int, int]]:
        step = max(1, SCORES_AT_ONCE // (self.num_rows * _ITEM_KEYS)) * _ITEM_KEYS
        for begin in range(0, self.num_keys, step):
            yield begin, min(begin + step, self.num_keys)


def _scores(q_RD: Tensor, k_SD: Tensor, position_R: Tensor, begin: int, end: int) -> Tensor:
    scores_RC: Tensor = (q_RD.float() * q_RD.shape[1] ** -0.5) @ k_SD[begin:end].float().T
    is_future_RC = torch.arange(begin, end, device=k_SD.device) > position_R.unsqueeze(1)
    return scores_RC.masked_fill_(is_future_RC, float("-inf"))


def _args(q_RD: Tensor, k_SD: Tensor, position_R: Tensor, begin: int, end: int, **outputs: Any) -> RowScoresArgs:
    return RowScoresArgs(
        q=q_RD.data_ptr(),
        k=k_SD.data_ptr(),
        positions=position_R.data_ptr(),
        num_rows=len(q_RD),
        num_keys=len(k_SD),
        head_dim=q_RD.shape[1],
        k_stride=k_SD.stride(0),
        begin=begin,
        end=end,
        scale=q_RD.shape[1] ** -0.5,
        dtype=dtype_id(q_RD.dtype),
        **outputs,
    )


def _call(args: RowScoresArgs, variant: Variant) -> None:
    call("colm_row_scores", args, variant, resolve_num_threads(None))


def vertical_slash_mass(
    q_THD: Tensor, k_KSD: Tensor, *, num_lists: int, num_rows: int = 64
) -> Steps[tuple[Tensor, Tensor]]:
    """Attention of the tile's last rows by key position and by distance (Jiang et al. 2024, algorithm 2).

    Args:
        q_THD: rotated queries.
        k_KSD: rotated keys of the prefix and the tile.
        num_lists: H, or K to add up the query heads of a kv head.
        num_rows: how many of the last queries are used.

    Returns:
        (vertical_LS, slash_LS) in fp32. Each row sums to the number of queries used, times G where L = K. Entry s of
        the second is the attention at distance s.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_prefill(q_THD, k_KSD, k_KSD)
    num_heads, num_kv_heads = q_THD.shape[1], k_KSD.shape[0]
    if num_lists not in (num_kv_heads, num_heads):
        raise ValueError(f"num_lists={num_lists} must be the {num_kv_heads} kv heads or the {num_heads} query heads")
    group = num_heads // num_kv_heads
    verticals, slashes = [], []
    for head in range(num_heads):
        rows = LastRows(q_THD[-num_rows:, head], k_KSD[head // group])
        yield from rows.normalise()
        vertical_S, diagonal_X = yield from rows.masses()
        verticals.append(vertical_S)
        slashes.append(diagonal_X[: rows.num_keys].flip(0))
    vertical_LS, slash_LS = torch.stack(verticals), torch.stack(slashes)
    if num_lists < num_heads:
        vertical_LS, slash_LS = (mass_HS.unflatten(0, (-1, group)).sum(dim=1) for mass_HS in (vertical_LS, slash_LS))
    return vertical_LS, slash_LS


def block_means(x_HXD: Tensor, block: int) -> Tensor:
    """Mean of every run of `block` tokens in fp32; the last run may be shorter."""
    num_heads, num_tokens, head_dim = x_HXD.shape
    means_HBD = torch.empty(num_heads, -(-num_tokens // block), head_dim, device=x_HXD.device)
    for of_head_BD, x_XD in zip(means_HBD, x_HXD, strict=True):  # one after the other: in fp32 they are large
        whole = num_tokens // block * block
        torch.mean(x_XD[:whole].float().unflatten(0, (-1, block)), dim=1, out=of_head_BD[: whole // block])
        if whole < num_tokens:
            of_head_BD[-1] = x_XD[whole:].float().mean(dim=0)
    return means_HBD
