"""Estimates of where attention goes, from a few products; `sparse_patterns` takes them as masses and scores.

Shapes: T queries of the tile, S keys (prefix and tile), H query heads, K kv heads, G = H / K, D head dim, L lists (K or
H), R last rows, C keys at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from colm_kernels.prefill_attention import check_prefill
from colm_kernels.steps import Steps

SCORES_AT_ONCE = 1 << 19
"""Scores held at a time, 2 MiB of them: what is done to them stays in the caches, and a step takes milliseconds."""


class LastRows:
    """The attention of the last rows of a prompt to the keys of one kv head, some keys at a time.

    Rows are held newest first. Then a key's distance from a row depends on the sum of their numbers alone: the key of
    number s lies S - 1 - (r + s) before row r, and is in its future where that is negative.

    Args:
        q_RGD: rotated queries of the kv head's query heads.
        k_SD: its rotated keys; the last R are the rows' own.
    """

    def __init__(self, q_RGD: Tensor, k_SD: Tensor) -> None:
        self.num_rows, self.group, head_dim = q_RGD.shape
        self.num_keys = len(k_SD)
        self._q_GRD = (q_RGD.float() * head_dim**-0.5).flip(0).transpose(0, 1).contiguous()
        self._k_SD = k_SD
        self._lse_GR1 = q_RGD.new_empty(self.group, self.num_rows, 1, dtype=torch.float32)

    def normalise(self) -> Steps[None]:
        """To be run once, before `weights`: each row's sum over its keys."""
        maximum_GR1 = torch.full_like(self._lse_GR1, float("-inf"))
        sum_GR1 = torch.zeros_like(maximum_GR1)
        for _, scores_GRC in self._scores():
            new_GR1 = torch.maximum(maximum_GR1, scores_GRC.amax(dim=2, keepdim=True))
            sum_GR1.mul_(maximum_GR1.sub_(new_GR1).exp_())
            sum_GR1.add_(scores_GRC.sub_(new_GR1).exp_().sum(dim=2, keepdim=True))
            maximum_GR1 = new_GR1
            yield
        torch.add(maximum_GR1, sum_GR1.log_(), out=self._lse_GR1)

    def weights(self) -> Iterator[tuple[int, Tensor]]:
        """(number of the first key, weights_GRC in fp32) of some keys after the others; those of the future are 0."""
        for start, scores_GRC in self._scores():
            yield start, scores_GRC.sub_(self._lse_GR1).exp_()

    def masses(self) -> Steps[tuple[Tensor, Tensor]]:
        """Attention by key, and by the sum of row's and key's number: (vertical_GS, diagonal_GX), X = S + R."""
        vertical_GS = self._lse_GR1.new_zeros(self.group, self.num_keys)
        diagonal_GX = self._lse_GR1.new_zeros(self.group, self.num_keys + self.num_rows)
        for start, weights_GRC in self.weights():
            vertical_GS[:, start : start + weights_GRC.shape[2]] = weights_GRC.sum(dim=1)
            self.add_by_diagonal(weights_GRC, start, diagonal_GX)
            yield
        return vertical_GS, diagonal_GX

    def add_by_diagonal(self, weights_GRC: Tensor, start: int, diagonal_GX: Tensor) -> None:
        """Add weights of the keys from a number on to the sums of their diagonals."""
        group, num_rows, num_keys = weights_GRC.shape
        padded_GRX = F.pad(weights_GRC, (0, num_rows))
        width = num_keys + num_rows
        # A row's entries one place further on than those of the row before: equal sums stand below one another.
        shifted_GRX = padded_GRX.as_strided((group, num_rows, width - 1), (num_rows * width, width - 1, 1))
        diagonal_GX[:, start : start + width - 1] += shifted_GRX.sum(dim=1)

    def by_row(self, diagonal_GX: Tensor, start: int, num_keys: int) -> Tensor:
        """The entry of each row and key's diagonal, as a view [G, R, num_keys]."""
        shape = (self.group, self.num_rows, num_keys)
        return diagonal_GX.as_strided(shape, (diagonal_GX.stride(0), 1, 1), diagonal_GX.storage_offset() + start)

    def are_nearer(self, start: int, num_keys: int, distance: int) -> Tensor:
        """Whether keys lie less than so far before a row, or in its future: bool [R, num_keys]."""
        row_R1 = torch.arange(self.num_rows, device=self._k_SD.device).unsqueeze(1)
        key_C = torch.arange(start, start + num_keys, device=self._k_SD.device)
        return row_R1 + key_C >= self.num_keys - distance

    def _scores(self) -> Iterator[tuple[int, Tensor]]:
        step = max(1, SCORES_AT_ONCE // (self.group * self.num_rows))
        for start in range(0, self.num_keys, step):
            scores_GRC = self._q_GRD @ self._k_SD[start : start + step].float().T
            if start + step > self.num_keys - self.num_rows:
                is_future_RC = self.are_nearer(start, scores_GRC.shape[2], 0)
                scores_GRC.masked_fill_(is_future_RC, float("-inf"))
            yield start, scores_GRC


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
    for kv_head, k_SD in enumerate(k_KSD):
        rows = LastRows(q_THD[-num_rows:, kv_head * group : (kv_head + 1) * group], k_SD)
        yield from rows.normalise()
        vertical_GS, diagonal_GX = yield from rows.masses()
        verticals.append(vertical_GS)
        slashes.append(diagonal_GX[:, : rows.num_keys].flip(1))
    if num_lists == num_heads:
        return torch.cat(verticals), torch.cat(slashes)
    return torch.stack([each.sum(dim=0) for each in verticals]), torch.stack([each.sum(dim=0) for each in slashes])


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
