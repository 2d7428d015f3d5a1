"""A prefill from the tiles of one layer, as they come in the turns of a run."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import zip_longest
from statistics import fmean
from typing import Protocol

from bench.prefill.estimate import Estimate, choose, estimate, strata
from bench.prefill.layer import TileSeconds


class Layer(Protocol):
    """What is timed."""

    def plan(self) -> float:
        """Seconds of planning its attention; none where it is dense."""

    def time(self, start: int, stop: int) -> TileSeconds:
        """Run the tile of tokens [start, stop)."""


class LayerSample:
    """Turns of one layer's tiles, and what they say of prefills with any number of such layers.

    Where every tile is in the sample, a turn runs the layer from its first tile to its last, as the engine does. Else a
    tile comes behind the layer's first one, which does not count there: in the engine, too, a layer's weights have just
    been read. Means of turns count, not medians: what a busy machine takes from a tile now and then, it takes from the
    whole as well.

    Args:
        layer: not shared with another sample.
        num_tokens: of the prompt.
        tile_tokens: of the engine.
        seed: of the choice of tiles.
    """

    def __init__(self, layer: Layer, *, num_tokens: int, tile_tokens: int, seed: int) -> None:
        self._layer, self._num_tokens, self._tile_tokens = layer, num_tokens, tile_tokens
        self._strata = strata(-(-num_tokens // tile_tokens))
        chosen = choose(self._strata, seed=seed)
        self.is_every_tile = len(chosen) == sum(map(len, self._strata))
        self.tiles = sorted(chosen) if self.is_every_tile else chosen
        """Those that are timed, in their order."""
        self._turns: defaultdict[int, list[TileSeconds]] = defaultdict(list)
        self._plan_s: list[float] = []

    def prepare(self) -> None:
        """Make the layer's plan, anew in each turn."""
        self._plan_s.append(self._layer.plan())
        if not self._turns:
            self._layer.time(*self._bounds(0))  # the first call of an operation also sets things up

    def take(self, tile: int) -> None:
        """Time one tile of a sample that does not hold every tile."""
        self._layer.time(*self._bounds(0))
        self._turns[tile].append(self._layer.time(*self._bounds(tile)))

    def take_all(self) -> None:
        """Time all tiles of the sample."""
        self.prepare()
        for tile in self.tiles:
            if self.is_every_tile:
                self._turns[tile].append(self._layer.time(*self._bounds(tile)))
            else:
                self.take(tile)

    def estimate(self, num_layers: int) -> Estimate:
        """What all layers take; the last one has keys and values only, and no plan."""
        num_whole = num_layers - 1
        costs = {
            tile: fmean(num_layers * each.keys_values_s + num_whole * each.rest_s for each in turns)
            for tile, turns in self._turns.items()
        }
        found = estimate(self._strata, costs, self._known, num_layers=num_layers)
        return replace(found, total=found.total + num_whole * fmean(self._plan_s))

    def _bounds(self, tile: int) -> tuple[int, int]:
        return tile * self._tile_tokens, min((tile + 1) * self._tile_tokens, self._num_tokens)

    def _known(self, tile: int) -> tuple[float, float]:
        """Rows, and pairs of query and key; what a sparse tile costs is a sum of the two as well."""
        start, stop = self._bounds(tile)
        rows = stop - start
        return rows, rows * start + rows * (rows + 1) / 2


def take_turns(samples: Iterable[LayerSample]) -> None:
    """One turn of each: whole layers where every tile is in, else tile by tile, so that ratios are of one moment."""
    listed = list(samples)
    if any(sample.is_every_tile for sample in listed):
        for sample in listed:
            sample.take_all()
        return
    for sample in listed:
        sample.prepare()
    for tiles in zip_longest(*(sample.tiles for sample in listed)):
        for sample, tile in zip(listed, tiles, strict=True):
            if tile is not None:
                sample.take(tile)


def share_timed(num_tokens: int, tile_tokens: int) -> float:
    """How much of a layer's tiles a turn times."""
    num_tiles = -(-num_tokens // tile_tokens)
    return len(choose(strata(num_tiles), seed=0)) / num_tiles
