"""The reader of the benchmark: a decode node's receiver, which keeps a part of what comes and checks it.

Shapes: N prompt tokens, K kv heads, E head dim, H query heads, R rows.
"""

import numpy as np
import torch
from colm_kernels import tolerance
from numpy.typing import NDArray
from torch import Tensor

from bench.prefill.case import exact_keys_values
from bench.random_weights import RandomWeights
from colm.checkpoint import assign
from colm.kv import KvFormat, KvTile
from colm.model import ChainTransformer, parameter_shapes
from colm.model.config import ChainConfig
from colm.model.rope import Rope
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore

PREFIX_TOKENS = 256
"""Rows that attend to everything before them whatever a plan says: block 0, their local keys, their row block."""
NUM_SAMPLED = 64
"""Rows of layer 0 that are made again."""
NUM_LAST = 2
"""Rows at the end, dense in every layer, whose layer 1 is made again from all of layer 0."""
STORED_DTYPE = torch.bfloat16
"""Of the weights on disk, whatever the node computes in."""
_KEYS_AT_ONCE = 1 << 16


class Sink(KvStore):
    """Stores layer 0, and of the other layers a prompt's first and last rows; the rest is read, verified and let go."""

    def __init__(self, kv_format: KvFormat, num_tokens: int) -> None:
        super().__init__(KvLayout(kv_format, page_tokens=64), num_pages=0)
        shape = (kv_format.num_kv_heads, num_tokens, kv_format.head_dim)
        self.layer0 = (torch.empty(shape, dtype=kv_format.dtype), torch.empty(shape, dtype=kv_format.dtype))
        num_kept = min(num_tokens, PREFIX_TOKENS)
        kept = (kv_format.num_layers, kv_format.num_kv_heads, num_kept, kv_format.head_dim)
        self.first = (torch.empty(kept, dtype=kv_format.dtype), torch.empty(kept, dtype=kv_format.dtype))
        self.last = (torch.empty(kept, dtype=kv_format.dtype), torch.empty(kept, dtype=kv_format.dtype))
        self.num_tokens = num_tokens

    def write(self, table_M: NDArray[np.int32], tile: KvTile) -> None:
        """As the store's; pages are not looked at."""
        del table_M
        num_kept = self.first[0].shape[2]
        stop = tile.first_token + tile.num_tokens
        for part, (x_KTE, first, last) in enumerate(zip((tile.k_KTD, tile.v_KTD), self.first, self.last, strict=True)):
            if tile.layer == 0:
                self.layer0[part][:, tile.first_token : stop] = x_KTE
            for kept, offset in ((first, 0), (last, self.num_tokens - num_kept)):
                begin, end = max(tile.first_token, offset), min(stop, offset + num_kept)
                if begin < end:
                    kept[tile.layer, :, begin - offset : end - offset] = x_KTE[
                        :, begin - tile.first_token : end - tile.first_token
                    ]


@torch.inference_mode()
def check(sink: Sink, config: ChainConfig, token_ids: NDArray[np.int64], seed: int, *, last_rows: bool) -> list[str]:
    """Hold what came against the model's definition in float64, where that can be told without the plans.

    Args:
        sink: of the whole prompt.
        config: of the model; its only chain is chain 1.
        token_ids: the prompt.
        seed: of the weights.
        last_rows: also layer 1 of the last rows, which takes all of layer 0.

    Returns:
        What was checked, in words.

    Raises:
        AssertionError: a key or value is off by more than its budget.
    """
    dtype = sink.layout.kv_format.dtype
    checked = []
    sampled_R = np.random.default_rng(seed).choice(len(token_ids), min(NUM_SAMPLED, len(token_ids)), replace=False)
    model = _model(config, seed)
    for wanted_KRE, came in zip(_layer0(model, token_ids, sampled_R), sink.layer0, strict=True):
        tolerance.layers(wanted_KRE, dtype, num_layers=1, width=config.dim).check(came[:, sampled_R])
    checked.append(f"layer 0 of {len(sampled_R)} sampled rows")
    exact = exact_keys_values(config, STORED_DTYPE, token_ids[:PREFIX_TOKENS], seed)
    for layer, wanted in enumerate(exact):
        for wanted_KRE, came in zip(wanted, sink.first, strict=True):
            tolerance.layers(wanted_KRE, dtype, num_layers=layer + 1, width=config.dim).check(came[layer])
    checked.append(f"every layer of the first {len(token_ids[:PREFIX_TOKENS])} rows, which attend to all before them")
    if last_rows:
        at_R = np.arange(len(token_ids) - NUM_LAST, len(token_ids))
        for wanted_KRE, came in zip(_layer1(model, token_ids, at_R, sink), sink.last, strict=True):
            tolerance.layers(wanted_KRE, dtype, num_layers=2, width=config.dim).check(came[1][:, -NUM_LAST:])
        checked.append(f"layer 1 of the last {NUM_LAST} rows, dense, over all of layer 0 as it came")
    return checked


def _model(config: ChainConfig, seed: int) -> ChainTransformer:
    with torch.device("meta"):
        model = ChainTransformer(config, 1)
    weights = RandomWeights(config=config, dtype=STORED_DTYPE, seed=seed)
    assign(model, weights.tensors(parameter_shapes(config, 1)), torch.float64)
    return model


def _hidden(model: ChainTransformer, token_ids: NDArray[np.int64], at_R: NDArray[np.int64]) -> Tensor:
    return model.embedding.embed(torch.from_numpy(token_ids[at_R]), 1)


def _heads(model: ChainTransformer, layer: int, x_RD: Tensor, at_R: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    """(q_RHE, k_KRE, v_KRE) of a layer's rows, rotated; by the oracle's forms."""
    block = model.blocks[layer]
    cos_RE, sin_RE = Rope(model.config).tables(torch.from_numpy(at_R))
    (q_RHE,), (k_RKE,), (v_RKE,) = block.attention.heads_by_chain(block.attention_norm.by_chain([x_RD]), cos_RE, sin_RE)
    return q_RHE, k_RKE.transpose(0, 1), v_RKE.transpose(0, 1)


def _layer0(model: ChainTransformer, token_ids: NDArray[np.int64], at_R: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    _, k_KRE, v_KRE = _heads(model, 0, _hidden(model, token_ids, at_R), at_R)
    return k_KRE, v_KRE


def _layer1(
    model: ChainTransformer, token_ids: NDArray[np.int64], at_R: NDArray[np.int64], sink: Sink
) -> tuple[Tensor, Tensor]:
    """Keys and values of layer 1, of rows that attend to all of layer 0 before them, as it came."""
    block, x_RD = model.blocks[0], _hidden(model, token_ids, at_R)
    q_RHE, _, _ = _heads(model, 0, x_RD, at_R)
    group = q_RHE.shape[1] // len(sink.layer0[0])
    outputs = []
    for head in range(q_RHE.shape[1]):
        k_NE, v_NE = (part[head // group] for part in sink.layer0)
        q_RE = q_RHE[:, head] * q_RHE.shape[2] ** -0.5
        scores_RN = torch.cat([q_RE @ k_CE.double().T for k_CE in k_NE.split(_KEYS_AT_ONCE)], dim=1)
        future_RN = torch.arange(len(k_NE)) > torch.from_numpy(at_R).unsqueeze(1)
        weights_RN = scores_RN.masked_fill_(future_RN, float("-inf")).softmax(dim=1)
        parts = zip(weights_RN.split(_KEYS_AT_ONCE, dim=1), v_NE.split(_KEYS_AT_ONCE), strict=True)
        outputs.append(sum(weights_RC @ v_CE.double() for weights_RC, v_CE in parts))
    out_RHE = torch.stack([out for out in outputs if isinstance(out, Tensor)], dim=1)
    (attended_RD,) = block.attention.wo.by_chain([out_RHE.flatten(1)])
    x_RD = x_RD + attended_RD
    (part_RD,) = block.ffn.by_chain(block.ffn_norm.by_chain([x_RD]))
    _, k_KRE, v_KRE = _heads(model, 1, x_RD + part_RD, at_R)
    return k_KRE, v_KRE
