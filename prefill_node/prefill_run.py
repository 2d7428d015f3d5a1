"""One prompt inside the engine: its tensors, where it stands, and whose rows lie beside its own.

Shapes: N prompt tokens, R rows of a pack, D chain-1 model features, K kv heads, E head dim, G query heads per kv head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from colm_kernels.native import CancelFlag
from colm_kernels.steps import Steps
from numpy.typing import NDArray
from torch import Tensor

from colm.model.block import Rows
from prefill_node.prefix_cache import KeptTile
from prefill_node.sparse.plan import LayerPlan
from prefill_node.sparse.prompt_plans import PromptPlans
from prefill_node.tile_cache import TileCache


@dataclass(frozen=True, slots=True)
class Due:
    """Attention that a tile still needs, and the feed-forward behind it."""

    layer: int
    start: int
    stop: int
    plan: LayerPlan | None
    """What it attends to; None is everything."""


class PrefillRun:
    """A prompt's way through the layers, one step at a time; `PrefillEngine.step` makes the steps.

    A step first does what is `due`, then computes the keys and values of the tile at (`layer`, `start`). In a layer
    that is planned, nothing is due before all keys are there; a second pass then makes the tiles' attention due, one a
    step.

    Tiles that were kept from an earlier prompt have no steps: in each layer, what was kept is laid where the tiles
    behind it will read it, and the steps begin there. A prompt that was kept whole has one step a layer, for the token
    behind it.

    A token behind the prompt may follow it through the layers, for the token that chain 1 would say next. It is one row
    more of the last tile, or runs by itself whenever all tiles of a layer are there. No tile depends on it.

    Args:
        token_ids: the prompt.
        num_layers: of the model.
        tile_tokens: of this run's tiles.
        prefix: the prompt's first tiles, as far as they were kept; none with sparse attention.
        sparse: plans its attention; None attends to everything.
        cancelled: ends it from any thread.
        last_token_id: the token behind the prompt; None for none.
        rides: it is a row of the last tile, which is computed.
    """

    hidden_ND: Tensor
    """The residual stream of what is computed; of several whole prompts in a pack, rows of one tensor."""
    k_KNE: Tensor
    """Of one layer, as the next one; with a place behind the prompt where a token follows it."""
    v_KNE: Tensor
    own_x_1D: Tensor
    """The residual stream of the token behind the prompt, where it runs by itself."""

    def __init__(
        self,
        token_ids: NDArray[np.int64],
        *,
        num_layers: int,
        tile_tokens: int,
        sparse: PromptPlans | None,
        cancelled: CancelFlag,
        prefix: Sequence[KeptTile] = (),
        last_token_id: int | None = None,
        rides: bool = False,
    ) -> None:
        self.token_ids = token_ids
        self.last_token_id = last_token_id
        self.rides = rides
        self.next_token_id: int | None = None
        """What chain 1 says behind `last_token_id`; None before its last layer, and of numbers that are none."""
        self.prefix = prefix
        self.num_cached_tokens = sum(kept.num_tokens for kept in prefix)
        """Of the prompt, those of `prefix`."""
        self.sparse = sparse
        self.cancelled = cancelled
        self.layer = 0
        self.start = self.num_cached_tokens
        self.is_second_pass = False
        self.plan: LayerPlan | None = None
        """Of the second pass."""
        self.planning: Steps[LayerPlan | None] | None = None
        """The rest of the layer's plan; None before it and after it."""
        self.due: Due | None = None
        self.has_begun = False
        """It has its tensors."""
        self.error: Exception | None = None
        """What it ended with; it makes no further step."""
        self.pack: Pack | None = None
        """Where its last tile's rows lie."""
        self.pack_rows = slice(0)
        self._num_layers = num_layers
        self.tile_tokens = tile_tokens

    @property
    def num_tokens(self) -> int:
        """Of the prompt."""
        return len(self.token_ids)

    @property
    def last_x_1D(self) -> Tensor:
        """The residual stream of the token behind the prompt."""
        return self.hidden_ND[-1:] if self.rides else self.own_x_1D

    @property
    def num_rows(self) -> int:
        """Of the prompt, and of the token behind it where that rides."""
        return self.row_stop(self.num_tokens)

    def row_stop(self, stop: int) -> int:
        """Where the rows end of a tile that ends at `stop`."""
        return stop + (self.rides and stop == self.num_tokens)

    @property
    def stop(self) -> int:
        """Where the tile ends that begins at `start`."""
        return min(self.start + self.tile_tokens, self.num_tokens)

    @property
    def is_kept(self) -> bool:
        """No tile need be computed."""
        return self.num_cached_tokens == self.num_tokens

    @property
    def is_last_layer(self) -> bool:
        """No tile attends to this layer's keys: their output would only feed the head, the decode node's work."""
        return self.layer == self._num_layers - 1

    @property
    def is_over(self) -> bool:
        """The last tile has been computed."""
        return self.layer == self._num_layers

    @contextmanager
    def own_errors(self) -> Iterator[None]:
        """End this run with what goes wrong inside, and leave those that share its step alone."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, it goes to whoever wants this prompt
            self.error = error

    def after_keys_values(self) -> None:
        """Move on: the tile's keys and values are there."""
        is_last = self.is_last_layer
        is_planned = not is_last and self.sparse is not None and self.sparse.covers(self.layer, self.num_tokens)
        self.due = None if is_last or is_planned else Due(self.layer, self.start, self.stop, None)
        self._move(begins_second_pass=is_planned)

    def lay_kept(self) -> None:
        """Before a layer's first step: lay what was kept where the rows behind it read it, if any do."""
        if self.start == self.num_cached_tokens and not (self.is_last_layer and self.last_token_id is None):
            for kept in self.prefix:
                first, (k_KTE, v_KTE) = kept.first_token, kept.layers[self.layer]
                self.k_KNE[:, first : first + kept.num_tokens] = k_KTE
                self.v_KNE[:, first : first + kept.num_tokens] = v_KTE

    def after_kept(self) -> None:
        """Move on: of a prompt that was kept whole, to the next layer."""
        self.layer += 1

    def is_planned(self) -> bool:
        """Plan a little more; whether the layer's `plan` is there now."""
        assert self.planning is not None
        try:
            next(self.planning)
        except StopIteration as end:
            self.plan, self.planning = end.value, None
        return self.planning is None

    def after_planned(self) -> None:
        """Move on: the second pass has come to a tile, whose attention the next step will do."""
        self.due = Due(self.layer, self.start, self.stop, self.plan)
        if self.stop == self.num_tokens:
            self.plan = None
        self._move(begins_second_pass=False)

    def _move(self, *, begins_second_pass: bool) -> None:
        self.start = self.stop
        if self.start == self.num_tokens:
            self.start, self.is_second_pass = self.num_cached_tokens, begins_second_pass
            self.layer += not begins_second_pass


@dataclass(slots=True)
class Pack:
    """Rows that go through a layer together: a tile of one run, or several whole prompts side by side."""

    num_runs: int
    start: int
    """Of the tile; 0 for whole prompts."""
    x_RD: Tensor
    rows: Rows
    normed_RD: Tensor | None = None
    """x after the norm of the layer that reads it."""

    @classmethod
    def kept(cls, runs: Sequence[PrefillRun], start: int) -> "Pack | None":
        """The pack in which exactly these rows lie already."""
        pack = runs[0].pack
        is_whole = pack is not None and (pack.num_runs, pack.start) == (len(runs), start)
        return pack if is_whole and all(run.pack is pack for run in runs) else None

    @classmethod
    def join(cls, runs: Sequence[PrefillRun], start: int, stop: int, rows: Rows) -> "Pack":
        """Lay the rows side by side, those of one run where they are; `stop` is read for one run alone."""
        if len(runs) == 1:
            (run,) = runs
            first = run.num_cached_tokens
            stop = run.row_stop(stop)
            pack = cls(1, start, run.hidden_ND[start - first : stop - first], rows)
            run.pack, run.pack_rows = pack, slice(0, stop - start)
            return pack
        pack = cls(len(runs), start, torch.cat([run.hidden_ND for run in runs]), rows)
        for run, (first, last) in zip(
            runs, pairwise(accumulate((run.num_rows for run in runs), initial=0)), strict=True
        ):
            run.pack, run.pack_rows = pack, slice(first, last)
            # Views, so that the rows need not be copied back and may go on in another pack.
            run.hidden_ND = pack.x_RD[first:last]
        return pack


class NobodyLeft(Exception):
    """Every run of a step has ended with an error; the rest of it would be for nobody."""


@dataclass(frozen=True, slots=True)
class PackCache:
    """The `LayerCache` of a pack: each run's rows write and read that run's keys and values alone."""

    members: Sequence[tuple[PrefillRun, TileCache]]

    def write(self, k_RKE: Tensor, v_RKE: Tensor, rows: Rows) -> None:
        """Store each run's keys and values."""
        for run, cache in self.members:
            with run.own_errors():
                own = run.pack_rows
                tables = rows.cos_RE[own], rows.sin_RE[own]
                cache.write(k_RKE[own], v_RKE[own], Rows((own.stop - own.start,), *tables))

    def attend(self, q_RKGE: Tensor) -> Tensor:
        """What each query gathers from its own run: out_RKGE; anything for a run that ends with an error.

        Raises:
            NobodyLeft: all of them have.
        """
        parts = []
        # A pack that is kept has the order in which it was joined, whatever order the runs are given in now.
        for run, cache in sorted(self.members, key=lambda member: member[0].pack_rows.start):
            out = q = q_RKGE[run.pack_rows]
            with run.own_errors():
                out = cache.attend(q)
            parts.append(out)
        if all(run.error for run, _ in self.members):
            raise NobodyLeft
        return parts[0] if len(parts) == 1 else torch.cat(parts)
