"""Chain 1 over a prompt, layer by layer, tile by tile.

Shapes: N prompt tokens, T tokens of a tile, S keys up to its end, D chain-1 model features, H chain-1 query heads, K kv
heads, E head dim, X rows anywhere.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial

import numpy as np
import torch
from colm_kernels.few_rows_linear import library_variant
from colm_kernels.native import HEAD_DIMS, CancelFlag, Variant
from colm_kernels.packed_linear import takes as packed_takes
from colm_kernels.prefill_attention import Backend, prefill_attention
from colm_kernels.prefill_layer import PrefillLayers, PrefillTile
from colm_kernels.rotary import rotate_
from colm_kernels.sparse_prefill_attention import sparse_prefill_attention
from numpy.typing import NDArray
from torch import Tensor

from colm.checkpoint import WeightSource, assign
from colm.errors import InvalidRequest
from colm.kv import KvFormat, KvTile, require_shared_kv
from colm.model import ChainTransformer, parameter_shapes
from colm.model.block import ChainBlock, Rows
from colm.model.linear import ChainLinear
from colm.model.one_call import step_layers
from colm.model.rope import Rope
from colm.placement import CPU
from prefill_node.memory import pack_bytes, run_bytes
from prefill_node.prefill_run import NobodyLeft, Pack, PackCache, PrefillRun
from prefill_node.prefix_cache import KeptTile
from prefill_node.sparse.plan import LayerPlan
from prefill_node.sparse.policy import ROW_BLOCK
from prefill_node.sparse.prompt_plans import PromptPlans
from prefill_node.tile_cache import TileCache


class PrefillEngine:
    """Holds chain 1's weights; a run holds one layer's keys and values and the hidden states.

    Args:
        source: only chain 1's tensors are read from it.
        kv_format: what the keys and values shall be; its dtype is also that of the computation.
        tile_tokens: tokens computed and sent at a time.
        device: where weights, hidden states, keys and values lie.
        attention_backend: what attends to the prompt so far, on CUDA.
        in_one_call: run each half of a layer in one call of the kernels' library where it can, for tiles of few rows;
            else, and on GPUs, the model's modules run one by one. Both give the same bits.
    """

    def __init__(
        self,
        source: WeightSource,
        kv_format: KvFormat,
        *,
        tile_tokens: int,
        device: torch.device = CPU,
        attention_backend: Backend = "auto",
        in_one_call: bool = True,
    ) -> None:
        if tile_tokens < 1:
            raise ValueError(f"tile_tokens={tile_tokens} must be at least 1")
        require_shared_kv(source.config)
        self.config = source.config
        self.kv_format = kv_format
        self.tile_tokens = tile_tokens
        self._device = device
        self._attention_backend = attention_backend
        with torch.device("meta"):
            self._model = ChainTransformer(source.config, 1)
        assign(self._model, source.tensors(parameter_shapes(source.config, 1)), kv_format.dtype, device)
        self._rope = Rope(source.config, device)
        self._is_packed = device.type == "cpu" and all(map(_is_packed, self._model.blocks))
        self._layers: PrefillLayers | None = None
        if in_one_call and (layers := step_layers(self._model, device)) is not None:
            heads = {"num_heads": source.config.chains[0], "num_kv_heads": kv_format.num_kv_heads}
            self._layers = PrefillLayers(layers, **heads, head_dim=kv_format.head_dim, eps=source.config.norm_eps)

    def begin(
        self,
        token_ids: NDArray[np.int64],
        *,
        sparse: PromptPlans | None = None,
        cancelled: CancelFlag | None = None,
        prefix: Sequence[KeptTile] = (),
        last_token_id: int | None = None,
    ) -> PrefillRun:
        """A run of a prompt, before its first step; it takes no memory yet.

        Args:
            token_ids: the prompt.
            sparse: plans the prompt's attention, layer by layer; tiles are then whole row blocks. None attends to
                everything.
            cancelled: looked at inside attention and plans, and between a tile's operations; once it is set, the run
                ends with `Cancelled`. Says how far the attention of the present step is, and 0 between steps.
            prefix: the prompt's first tiles, where another run of this engine has computed them; dense alone. All of
                its tiles only where `last_token_id` is to be read: else there is nothing to do.
            last_token_id: the token behind the prompt, if the run shall find chain 1's most likely one behind that: its
                `next_token_id`, with the last tile. Tiles have the same bits without it.

        Raises:
            InvalidRequest: no tokens, more than the model's context, or an id outside the vocabulary.
        """
        self.check(token_ids)
        if sparse is not None and not sparse.covers_any(len(token_ids)):
            sparse = None
        return PrefillRun(
            token_ids,
            num_layers=self.kv_format.num_layers,
            tile_tokens=self.tile_tokens if sparse is None else max(1, self.tile_tokens // ROW_BLOCK) * ROW_BLOCK,
            sparse=sparse,
            cancelled=cancelled or CancelFlag(),
            prefix=prefix,
            last_token_id=last_token_id,
            rides=last_token_id is not None and sparse is None and self._may_ride(len(token_ids), prefix),
        )

    def _may_ride(self, num_tokens: int, prefix: Sequence[KeptTile]) -> bool:
        """Whether a prompt's last tile has the same bits beside one more row; False if it is not computed.

        The library's products and its attention give a row the same bits in any company, as long as the same ones are
        used.
        """
        if self._device.type != "cpu" or self.kv_format.head_dim not in HEAD_DIMS:
            return False
        if sum(kept.num_tokens for kept in prefix) == num_tokens:
            return False
        num_rows = (num_tokens - 1) % self.tile_tokens + 1
        few, one_more = (library_variant(rows, self.kv_format.dtype) for rows in (num_rows, num_rows + 1))
        return few == one_more and (few != "torch" or self._is_packed)

    @torch.inference_mode()
    def step(self, runs: Sequence[PrefillRun]) -> list[KvTile | None]:
        """Make the next step of a run, or of several as one.

        Tiles come layer by layer, in token order, without those that were kept. A tile's tensors are views that the
        run's next layer overwrites: use or copy them before its next step. A sparse layer is planned when all its keys
        and values are there; its attention then follows tile by tile, and each step of it brings a tile without
        tokens, which says only that there is more to do. So does each step of a prompt that was kept whole.

        Args:
            runs: neither over nor ended by an error. Several must be dense, stand at the same layer, and have their
                whole prompts in one tile, of which nothing is kept; what a run computes differs by rounding from what
                it computes alone.

        Returns:
            Each run's tile; None where the run has ended with an error, which is then its `error`.

        Raises:
            Exception: what no run alone is to blame for, e.g. too little memory for their rows; none can go on.
        """
        tiles: dict[PrefillRun, KvTile] = {}
        for run in runs:
            with run.own_errors():
                run.cancelled.raise_if_set()
                if not run.has_begun:
                    self._allocate(run)
        with suppress(NobodyLeft):
            if (left := _left(runs))[0].due is not None:
                self._attend(left)
            left = _left(runs)
            if left[0].is_kept:
                tiles = self._pass_kept(*left)
            else:
                tiles = self._plan_tile(*left) if left[0].is_second_pass else self._write_keys_values(left)
        for run, tile in tiles.items():
            if run.last_token_id is not None and tile.first_token + tile.num_tokens == run.num_tokens:
                with run.own_errors():
                    self._read_last_token(run, tile.layer)
        for run in runs:
            run.cancelled.rewind()
        return [None if run.error is not None else tiles.get(run) for run in runs]

    def run(
        self,
        token_ids: NDArray[np.int64],
        *,
        sparse: PromptPlans | None = None,
        cancelled: CancelFlag | None = None,
    ) -> Iterator[KvTile]:
        """All steps of a prompt that nothing shares the engine with; see `begin` and `step`.

        Raises:
            InvalidRequest: as from `begin`.
            Exception: what the run ended with; `Cancelled` where `cancelled` was set.
        """
        run = self.begin(token_ids, sparse=sparse, cancelled=cancelled)
        while not run.is_over:
            (tile,) = self.step([run])
            if tile is None:
                assert run.error is not None
                raise run.error
            yield tile

    def _allocate(self, run: PrefillRun) -> None:
        run.has_begun = True
        kv_format, device, embed = self.kv_format, self._device, self._model.embedding.embed
        last = np.array([] if run.last_token_id is None else [run.last_token_id], dtype=np.int64)
        if (num_cached := run.num_cached_tokens) < run.num_tokens:
            read = np.append(run.token_ids[num_cached:], last[: run.rides])
            run.hidden_ND = embed(torch.from_numpy(read).to(device), 1)
        if run.last_token_id is not None and not run.rides:
            run.own_x_1D = embed(torch.from_numpy(last).to(device), 1)
        num_rows = run.num_tokens + (run.last_token_id is not None)
        shape = (kv_format.num_kv_heads, num_rows, kv_format.head_dim)
        run.k_KNE = torch.empty(shape, dtype=kv_format.dtype, device=device)
        run.v_KNE = torch.empty_like(run.k_KNE)

    def _pass_kept(self, run: PrefillRun) -> dict[PrefillRun, KvTile]:
        """A layer of a prompt that was kept whole: the token behind it alone goes through."""
        with run.own_errors():
            layer = run.layer
            run.lay_kept()
            run.after_kept()
            self._read_last_token(run, layer)
            return {run: KvTile(run.layer, 0, run.k_KNE[:, :0], run.v_KNE[:, :0])}
        raise NobodyLeft

    def _attend(self, runs: Sequence[PrefillRun]) -> None:
        """Do what is due, with everything behind it in the layer."""
        due = [(run, run.due) for run in runs if run.due is not None]
        _, first = due[0]
        layer, pack = self._model.blocks[first.layer], self._pack(runs, first.start, first.stop)
        if pack.normed_RD is None:
            # In a second pass computed again: kept for all tiles, these rows would be as large as the hidden states.
            pack.normed_RD = layer.attention_norm(pack.x_RD, 1)
        if first.plan is None and (few := self._few_rows(runs, pack)) is not None:
            layers, tile, variant = few
            with runs[0].own_errors():
                pack.x_RD += layers.attend(first.layer, pack.x_RD, pack.normed_RD, tile, variant)
        else:
            members = [(run, self._cache(run, each.start, run.row_stop(each.stop), each.plan)) for run, each in due]
            pack.x_RD += layer.attend(pack.x_RD, pack.normed_RD, pack.rows, PackCache(members))
        for run in runs:
            run.due = None
            with run.own_errors():
                run.cancelled.raise_if_set()

    def _write_keys_values(self, runs: Sequence[PrefillRun]) -> dict[PrefillRun, KvTile]:
        """The tiles of the layer at which the runs stand; before its attention, so that the wire has them meanwhile."""
        for run in runs:
            run.lay_kept()
        index, pack = runs[0].layer, self._pack(runs, runs[0].start, runs[0].stop)
        if (few := self._few_rows(runs, pack)) is not None:
            layers, tile, variant = few
            pack.normed_RD = layers.write_keys_values(index, pack.x_RD, tile, variant)
        else:
            layer = self._model.blocks[index]
            pack.normed_RD = layer.attention_norm(pack.x_RD, 1)
            cache = PackCache([(run, self._cache(run, run.start, run.row_stop(run.stop), None)) for run in runs])
            layer.write_keys_values(pack.normed_RD, pack.rows, cache)
        tiles = {}
        for run in _left(runs):
            k_KTE, v_KTE = run.k_KNE[:, run.start : run.stop], run.v_KNE[:, run.start : run.stop]
            tiles[run] = KvTile(run.layer, run.start, k_KTE, v_KTE)
            run.after_keys_values()
        return tiles

    def _few_rows(self, runs: Sequence[PrefillRun], pack: Pack) -> tuple[PrefillLayers, PrefillTile, Variant] | None:
        """What runs half a layer in one call; None for several runs, for many rows, and where modules must run it."""
        if len(runs) > 1 or self._layers is None:
            return None
        (run,) = runs
        if (variant := self._layers.variant_for(len(pack.x_RD))) == "torch":
            return None
        rows = pack.rows
        return (
            self._layers,
            PrefillTile(rows.cos_RE, rows.sin_RE, run.k_KNE, run.v_KNE, pack.start, run.cancelled),
            variant,
        )

    def _plan_tile(self, run: PrefillRun) -> dict[PrefillRun, KvTile]:
        """A step of the second pass: a part of the layer's plan, or have the next tile's attention due."""
        with run.own_errors():
            if run.start == 0 and run.planning is None:
                assert run.sparse is not None
                queries_of = partial(self._queries, self._model.blocks[run.layer], run.hidden_ND)
                run.planning = run.sparse.plan(run.layer, queries_of, run.k_KNE[:, : run.num_tokens])
            more = KvTile(run.layer + 1, 0, run.k_KNE[:, :0], run.v_KNE[:, :0])
            if run.start > 0 or run.is_planned():
                run.after_planned()
            return {run: more}
        raise NobodyLeft

    def _read_last_token(self, run: PrefillRun, index: int) -> None:
        """Run the token behind the prompt through a layer whose keys and values are all there; the last says the next.

        By itself; where it rides on the last tile, that was done but for the last layer's end, which no tile has.
        """
        if run.rides and not run.is_over:
            return
        start, stop, x_1D = run.num_tokens, run.num_tokens + 1, run.last_x_1D
        pack = Pack(1, start, x_1D, Rows((1,), *self._rope.range(start, stop)))
        if (few := self._few_rows([run], pack)) is not None:
            layers, row, variant = few
            x_1D += layers.attend(index, x_1D, layers.write_keys_values(index, x_1D, row, variant), row, variant)
        else:
            layer = self._model.blocks[index]
            normed_1D = layer.attention_norm(x_1D, 1)
            x_1D += layer.step(x_1D, normed_1D, pack.rows, self._cache(run, start, stop, None))
        if run.is_over:
            logits_V = self._model.output_table.logits(self._model.final_norm(x_1D, 1), (1,))[0]
            best = logits_V.argmax()
            run.next_token_id = int(best) if bool(logits_V[best].isfinite()) else None

    def _cache(self, run: PrefillRun, start: int, stop: int, plan: LayerPlan | None) -> TileCache:
        attention = partial(self._dense if plan is None else partial(_sparse, plan=plan), cancelled=run.cancelled)
        return TileCache(run.k_KNE, run.v_KNE, start, stop, attention)

    def _pack(self, runs: Sequence[PrefillRun], start: int, stop: int) -> Pack:
        """The rows of one run's tile, or of whole prompts, with their rotation."""
        if (pack := Pack.kept(runs, start)) is not None:
            return pack
        tiles = [(start, runs[0].row_stop(stop))] if len(runs) == 1 else [(0, run.num_rows) for run in runs]
        tables = [self._rope.range(*tile) for tile in tiles]
        cos_RE, sin_RE = tables[0] if len(tables) == 1 else (torch.cat(each) for each in zip(*tables, strict=True))
        return Pack.join(runs, start, stop, Rows((len(cos_RE),), cos_RE, sin_RE))

    def _queries(self, layer: ChainBlock, hidden_ND: Tensor, position_X: Tensor) -> Tensor:
        """q_XHE of any positions, rotated."""
        position_X = position_X.to(self._device)
        normed_XD = layer.attention_norm(hidden_ND[position_X], 1)
        q_XHE = layer.attention.queries(normed_XD, (len(position_X),))
        return rotate_(q_XHE, *self._rope.tables(position_X))

    def _dense(self, q_THE: Tensor, k_KSE: Tensor, v_KSE: Tensor, *, cancelled: CancelFlag) -> Tensor:
        out_THE, _ = prefill_attention(q_THE, k_KSE, v_KSE, backend=self._attention_backend, cancelled=cancelled)
        cancelled.raise_if_set()
        return out_THE

    @torch.inference_mode()
    def probe_attention(self, *, num_queries: int, num_keys: int) -> None:
        """Attend once as `run` does with a tile's queries over a prompt so far, of ones; for its time."""
        kv_format = self.kv_format
        shapes = [(num_queries, self.config.chains[0], kv_format.head_dim)]
        shapes += 2 * [(kv_format.num_kv_heads, num_keys, kv_format.head_dim)]
        q_THE, k_KSE, v_KSE = (torch.ones(shape, dtype=kv_format.dtype, device=self._device) for shape in shapes)
        out_THE, _ = prefill_attention(q_THE, k_KSE, v_KSE, backend=self._attention_backend)
        out_THE.cpu()

    def memory_bytes(
        self,
        num_tokens: int,
        sparse: PromptPlans | None = None,
        *,
        num_cached_tokens: int = 0,
        reads_last_token: bool = False,
    ) -> int:
        """Predicted peak of a `run` over so many tokens, beside weights and cache; see `prefill_node.memory`."""
        dense = run_bytes(
            self.config,
            self.kv_format.dtype,
            num_tokens=num_tokens,
            tile_tokens=self.tile_tokens,
            num_cached_tokens=num_cached_tokens,
            reads_last_token=reads_last_token,
        )
        return dense + (0 if sparse is None else sparse.memory_bytes(num_tokens, self.tile_tokens))

    def pack_bytes(self, num_tokens: int) -> int:
        """What a run of so many tokens may hold of those that have shared its steps; see `prefill_node.memory`."""
        return pack_bytes(self.config, self.kv_format.dtype, num_tokens=num_tokens, tile_tokens=self.tile_tokens)

    def check(self, token_ids: NDArray[np.int64]) -> None:
        """Refuse a prompt that this model cannot read."""
        if not 1 <= len(token_ids) <= self.config.max_context:
            raise InvalidRequest("num_tokens", len(token_ids), f"must be between 1 and {self.config.max_context}")
        if (worst := int(token_ids.max())) >= self.config.vocab_size or (worst := int(token_ids.min())) < 0:
            raise InvalidRequest("token_ids", worst, f"must be below the vocabulary size {self.config.vocab_size}")


def _left(runs: Sequence[PrefillRun]) -> list[PrefillRun]:
    """Those that can go on.

    Raises:
        NobodyLeft: none.
    """
    left = [run for run in runs if run.error is None]
    if not left:
        raise NobodyLeft
    return left


def _is_packed(layer: ChainBlock) -> bool:
    """Whether the library makes the products of many rows, whichever they are."""
    linears = [module for module in layer.modules() if isinstance(module, ChainLinear)]
    return all(
        packed_takes(torch.empty(1, weight.shape[1], dtype=weight.dtype), [weight], [])
        for linear in linears
        for weight in linear.matrices(1)
    )


def _sparse(q_THE: Tensor, k_KSE: Tensor, v_KSE: Tensor, *, plan: LayerPlan, cancelled: CancelFlag) -> Tensor:
    index = plan.index(k_KSE.shape[1] - len(q_THE), q_THE)
    out_THE, _ = sparse_prefill_attention(q_THE, k_KSE, v_KSE, index, cancelled=cancelled)
    cancelled.raise_if_set()
    return out_THE
