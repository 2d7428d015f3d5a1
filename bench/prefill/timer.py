"""Real runs of a group: whole prefills and turns of samples beside one another, and the peers."""

import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch

from bench import peers
from bench.harness.units import duration, length
from bench.peers import Peer, PeerAbsent
from bench.prefill.case import CHECKED_TILE_TOKENS, check_engine, engine_of_random, prompt
from bench.prefill.cost import layer_of
from bench.prefill.estimate import Estimate
from bench.prefill.layer import KeysValues, SampledLayer, block_of
from bench.prefill.plan import Group, Row
from bench.prefill.sampling import LayerSample, take_turns
from bench.prefill.sparse import Budget
from colm.kv import KvFormat
from colm.model.block import ChainBlock
from colm.model.config import ChainConfig
from colm.model.presets import preset
from prefill_node.engine import PrefillEngine

WARM_UP_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """What came of a row."""

    sample: Estimate
    whole_s: Sequence[float] = ()
    """One a round; none where only the sample ran."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerTimed:
    """What came of a peer."""

    version: str = ""
    seconds: Sequence[float] = ()
    """One a round, those of the rows."""
    absent: str = ""
    """Why it did not run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What came of a group."""

    rows: Mapping[Row, Timed]
    peers: Mapping[str, PeerTimed] = field(default_factory=dict)


@dataclass(kw_only=True)
class EngineTimer:
    """Times groups through the engine itself. Weights are kept from one length to the next, until `keep`.

    Args:
        dtype: of weights and computation.
        tile_tokens: of the engine.
        seed: of weights, prompts and samples.
        budget: of sparse rows.
        clock: in seconds.
        say: told of each prefill.
    """

    dtype: torch.dtype
    tile_tokens: int
    seed: int
    budget: Budget
    clock: Callable[[], float] = time.perf_counter
    say: Callable[[str], object] = sys.stderr.write
    _engines: dict[str, PrefillEngine] = field(default_factory=dict)
    _blocks: dict[ChainConfig, ChainBlock] = field(default_factory=dict)
    _peers: dict[str, Peer | str] = field(default_factory=dict)
    _open_peers: ExitStack = field(default_factory=ExitStack)

    def keep(self, presets: Collection[str], *, with_peers: bool) -> None:
        """Let go of the engines of all other presets, and of peers that no group is for."""
        self._engines = {name: engine for name, engine in self._engines.items() if name in presets}
        if not with_peers:
            self._open_peers.close()
            self._peers = {name: peer for name, peer in self._peers.items() if isinstance(peer, str)}

    def close(self) -> None:
        """Let go of everything."""
        self.keep((), with_peers=False)

    def measure(self, group: Group, *, is_whole: bool, num_rounds: int) -> Seen:
        """Rounds in which all rows take turns.

        On a sample, every tile of every layer has its turn. Whole prefills are run between two turns of the sample of
        their layer, so that one can be held against the other, and the peers behind them.
        """
        samples = self._samples(group)
        if not is_whole:
            for _ in range(num_rounds):
                take_turns(dict.fromkeys(samples.values()))
            return Seen(rows={row: Timed(sample=self._estimate(row, each)) for row, each in samples.items()})
        for row in group.rows:
            self._warm_up(row, group.num_tokens)
        beside = {name: self._peer(name, preset(group.baseline)) for name in group.peers}
        whole_s: dict[Row, list[float]] = {row: [] for row in group.rows}
        peer_s: dict[str, list[float]] = {name: [] for name in group.peers}
        for _ in range(num_rounds):
            for row in group.rows:
                samples[row].take_all()
                whole_s[row].append(self._prefill(row, group.num_tokens))
                samples[row].take_all()
            for name, peer in beside.items():
                if not isinstance(peer, str):
                    try:
                        peer_s[name].append(self._prefill_by(name, peer, group))
                    except Exception as err:  # noqa: BLE001 - whatever ails other software, our rows are measured
                        beside[name] = self._peers[name] = f"it failed: {err}"
        return Seen(
            rows={row: Timed(sample=self._estimate(row, each), whole_s=whole_s[row]) for row, each in samples.items()},
            peers={
                name: PeerTimed(absent=peer)
                if isinstance(peer, str)
                else PeerTimed(version=peer.version, seconds=peer_s[name])
                for name, peer in beside.items()
            },
        )

    def _samples(self, group: Group) -> dict[Row, LayerSample]:
        """Of each row; rows of the same layers have one in common, and those of the same heads keys and values."""
        held: dict[tuple[int, int], KeysValues] = {}
        found: dict[tuple[ChainConfig, str], LayerSample] = {}
        samples = {}
        for row in group.rows:
            config = preset(row.preset)
            kv_format = KvFormat.of(config, self.dtype)
            heads = (kv_format.num_kv_heads, kv_format.head_dim)
            if heads not in held:
                held[heads] = KeysValues.random(kv_format, group.num_tokens, self.seed)
            layer = layer_of(config)
            if (layer, row.attention) not in found:
                is_sparse = row.attention == "sparse"
                tile_tokens = self.budget.tile_tokens(self.tile_tokens) if is_sparse else self.tile_tokens
                sampled = SampledLayer(
                    config,
                    self.dtype,
                    held[heads],
                    tile_tokens=tile_tokens,
                    seed=self.seed,
                    block=self._block(config),
                    plans=partial(self.budget.plans, config) if is_sparse else None,
                    clock=self.clock,
                )
                found[layer, row.attention] = LayerSample(
                    sampled, num_tokens=group.num_tokens, tile_tokens=tile_tokens, seed=self.seed
                )
            samples[row] = found[layer, row.attention]
        return samples

    def _estimate(self, row: Row, sample: LayerSample) -> Estimate:
        return sample.estimate(preset(row.preset).num_layers)

    def _block(self, config: ChainConfig) -> ChainBlock:
        """A layer with random weights, once an engine of such layers has been held against the definition."""
        layer = layer_of(config)
        if layer not in self._blocks:
            check_engine(config, self.dtype, min(self.tile_tokens, CHECKED_TILE_TOKENS), self.seed)
            self._blocks[layer] = block_of(config, self.dtype, self.seed)
        return self._blocks[layer]

    def _warm_up(self, row: Row, num_tokens: int) -> None:
        if row.preset not in self._engines:
            self._engines[row.preset] = engine_of_random(preset(row.preset), self.dtype, self.tile_tokens, self.seed)
        if row.attention == "dense":
            token_ids = prompt(preset(row.preset), min(self.tile_tokens, num_tokens), self.seed)
            deque(self._engines[row.preset].run(token_ids), maxlen=0)

    def _prefill(self, row: Row, num_tokens: int) -> float:
        config = preset(row.preset)
        token_ids = prompt(config, num_tokens, self.seed)
        began_s = self.clock()
        plans = self.budget.plans(config) if row.attention == "sparse" else None
        deque(self._engines[row.preset].run(token_ids, sparse=plans), maxlen=0)
        return self._told(row.name, num_tokens, self.clock() - began_s)

    def _prefill_by(self, name: str, peer: Peer, group: Group) -> float:
        token_ids = prompt(preset(group.baseline), group.num_tokens, self.seed)
        began_s = self.clock()
        peer.prefill(token_ids)
        return self._told(name, group.num_tokens, self.clock() - began_s)

    def _told(self, name: str, num_tokens: int, seconds: float) -> float:
        self.say(f"  {name} {length(num_tokens)}: {duration(seconds)}\n")
        return seconds

    def _peer(self, name: str, config: ChainConfig) -> Peer | str:
        """A peer that has run once, or why it is absent."""
        if name not in self._peers:
            weights = peers.weights_for(config, self.dtype, self.seed)
            try:
                peer = self._open_peers.enter_context(peers.PEERS[name](weights, self.dtype, max(peers.LENGTHS)))
                peer.prefill(prompt(config, WARM_UP_TOKENS, self.seed))
                self._peers[name] = peer
            except PeerAbsent as err:
                self._peers[name] = str(err)
            except Exception as err:  # noqa: BLE001 - as above
                self._peers[name] = f"it failed: {err}"
        return self._peers[name]
