"""Prefills of several models and lengths that take turns, each beside the matrix product of its own moment.

Shapes: N prompt tokens, K kv heads, E head dim.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import mean
from typing import Any

import numpy as np
import torch
from colm_kernels import tolerance
from numpy.typing import NDArray
from torch import Tensor

from bench.harness.contest import Case, Contest, Run, timed
from bench.kernels.common import gemm_ceiling, short
from bench.prefill.memory import Prefill
from bench.prefill.parts import parts_timed
from bench.random_weights import RandomWeights
from colm.checkpoint import assign
from colm.flops import prefill_flops
from colm.kv import KvFormat
from colm.model import ChainTransformer, parameter_shapes
from colm.model.config import ChainConfig
from colm.model.transformer import slice_config
from colm.placement import CPU
from prefill_node.engine import PrefillEngine

GEMM_SHAPES = ((512, 2048, 2048), (2048, 1024, 2048), (2048, 2048, 2048))
"""Rows, inner and outer dimension; the best of them is what a machine reaches."""

CHECKED_LAYERS, CHECKED_VOCAB_SIZE = 2, 256
CHECKED_TILE_TOKENS = 256
"""Layers keep their shape; there are fewer of them, so that the oracle in float64 is quick."""


@dataclass(frozen=True, kw_only=True)
class PrefillCase(Case):
    """All prefills of a run."""

    prefills: Sequence[Prefill]
    dtype: torch.dtype
    tile_tokens: int

    @property
    def name(self) -> str:
        """How it computes; contenders have the names of models and lengths."""
        return f"prefill_{short(self.dtype)}_t{self.tile_tokens}"

    @property
    def configs(self) -> dict[str, ChainConfig]:
        """Of the models, by name."""
        return {prefill.model: prefill.config for prefill in self.prefills}

    @property
    def shape(self) -> dict[str, Any]:
        """Chain 1 of each model."""
        shape: dict[str, Any] = {"dtype": short(self.dtype), "tile_tokens": self.tile_tokens}
        return shape | {model: {"model": model} | _chain1(config) for model, config in self.configs.items()}

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """One contender a prefill; a model's weights are made in its first turn, when all have been checked."""

        @cache
        def engine_of(config: ChainConfig) -> PrefillEngine:
            return engine_of_random(config, self.dtype, self.tile_tokens, seed)

        def check() -> None:
            for config in self.configs.values():
                check_engine(config, self.dtype, min(self.tile_tokens, CHECKED_TILE_TOKENS), seed)

        def prefill_once(prefill: Prefill) -> None:
            token_ids = prompt(prefill.config, prefill.num_tokens, seed)
            deque(engine_of(prefill.config).run(token_ids), maxlen=0)

        gemms = [gemm_ceiling(self.dtype, *shape) for shape in GEMM_SHAPES]
        yield Contest(
            check=check,
            contenders={each.name: self.turn(each, partial(prefill_once, each), gemms) for each in self.prefills},
        )

    def turn(self, prefill: Prefill, prefill_once: Callable[[], None], gemms: Sequence[Run]) -> Run:
        """One prefill between two runs of the matrix products, of which the best is what the machine reaches then."""
        gflops = prefill_flops(prefill.config, prefill.num_tokens) / 1e9
        run = timed(prefill_once, tokens=prefill.num_tokens, gflops=gflops)

        def turn() -> Mapping[str, float]:
            before = [gemm() for gemm in gemms]
            seen = run()
            after = [gemm() for gemm in gemms]
            rate = max(mean(each["gflops_per_s"] for each in pair) for pair in zip(before, after, strict=True))
            return {**seen, "gemm_gflops_per_s": rate, "gemm_fraction": seen["gflops_per_s"] / rate}

        return turn


class ProfileCase(PrefillCase):
    """Where the time of the same prefills goes."""

    @property
    def name(self) -> str:
        """As the other's."""
        return f"{super().name}_profile"

    def turn(self, prefill: Prefill, prefill_once: Callable[[], None], gemms: Sequence[Run]) -> Run:
        """Each part's share of the time, and the rest's: the engine's own loop, the embedding, the last addition."""
        del prefill, gemms
        run = timed(prefill_once)

        def turn() -> Mapping[str, float]:
            with parts_timed() as seconds:
                seen = run()
            shares = {f"{part}_fraction": each / seen["s"] for part, each in seconds.items()}
            return {**seen, **shares, "rest_fraction": 1 - sum(shares.values())}

        return turn


def prompt(config: ChainConfig, num_tokens: int, seed: int) -> NDArray[np.int64]:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, num_tokens)


def engine_of_random(
    config: ChainConfig, dtype: torch.dtype, tile_tokens: int, seed: int, device: torch.device = CPU
) -> PrefillEngine:
    """The engine that a prefill node runs, with random weights."""
    weights = RandomWeights(config=config, dtype=dtype, seed=seed)
    return PrefillEngine(weights, KvFormat.of(config, dtype), tile_tokens=tile_tokens, device=device)


@torch.inference_mode()
def check_engine(
    config: ChainConfig, dtype: torch.dtype, tile_tokens: int, seed: int, device: torch.device = CPU
) -> None:
    """Hold keys and values of a short prompt, of a tile and a quarter, against the model's definition in float64.

    Raises:
        AssertionError: one is off by more than its budget.
    """
    config = replace(config, num_layers=CHECKED_LAYERS, vocab_size=CHECKED_VOCAB_SIZE)
    token_ids = prompt(config, tile_tokens + -(-tile_tokens // 4), seed)
    exact = exact_keys_values(config, dtype, token_ids, seed)
    width = slice_config(config, 1).dim
    for tile in engine_of_random(config, dtype, tile_tokens, seed, device).run(token_ids):
        stop = tile.first_token + tile.num_tokens
        for result, whole_KNE in zip((tile.k_KTD, tile.v_KTD), exact[tile.layer], strict=True):
            wanted = whole_KNE[:, tile.first_token : stop]
            tolerance.layers(wanted, dtype, num_layers=tile.layer + 1, width=width).check(result.cpu())


def exact_keys_values(
    config: ChainConfig, dtype: torch.dtype, token_ids: NDArray[np.int64], seed: int
) -> list[tuple[Tensor, Tensor]]:
    """(k_KNE, v_KNE) of each layer by the whole prompt at once, in float64 from weights in dtype."""
    with torch.device("meta"):
        model = ChainTransformer(config, 1)
    weights = RandomWeights(config=config, dtype=dtype, seed=seed)
    assign(model, weights.tensors(parameter_shapes(config, 1)), torch.float64)
    return [(k_KNE, v_KNE) for _, k_KNE, v_KNE in model.chain1_heads(torch.from_numpy(token_ids))]


def _chain1(config: ChainConfig) -> dict[str, int]:
    chain1 = slice_config(config, 1)
    widths = {"dim": chain1.dim, "hidden_dim": chain1.hidden_dim, "head_dim": chain1.head_dim}
    heads = {"num_heads": chain1.num_heads, "num_kv_heads": chain1.num_kv_heads}
    return widths | heads | {"num_layers": chain1.num_layers, "vocab_size": chain1.vocab_size}
