"""Measures this machine for a machine file: the best that this project's prefill reaches on it in a few rounds.

The best, since whoever else uses the machine only takes away from it. Where others were there all the time, the best is
still too slow, by as much as they took; `calibrate` says so.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from colm_kernels.prefill_attention import prefill_attention

from bench.harness.environment import environment
from bench.kernels.common import read_ceiling, short
from bench.kv_stream.codec import StreamCase
from bench.peers.weights import RepeatedWeights
from bench.prefill.layer import KeysValues, SampledLayer
from bench.random_weights import RandomCheckpoint
from bench.roofline.machine import Machine
from bench.roofline.model import Prompt
from colm import defaults
from colm.flops import causal_attention_flops
from colm.kv import KvFormat
from colm.model.config import ChainConfig
from colm.model.presets import preset
from colm.model.weights import WeightLayout
from decode_node.engine import DecodeEngine
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from decode_node.plan import PlanRow, StepPlan

PRESET: Final = "llama-3.2-1b-16-16-air"
"""Its products are of middling size: half as wide as the baseline's, twice as wide as {8,8,8,8}'s."""
ROUNDS: Final = 10
_KEYS: Final = 8192
NARROW: Final = replace(
    preset("llama-3.2-1b-8-8-8-8-air"),
    dim=256,
    hidden_dim=256,
    num_heads=4,
    num_kv_heads=1,
    chains=(1, 1, 1, 1),
    vocab_size=256,
)
"""So narrow that its weights take no time: what a step takes is the host's. Less the time of reading a wider layer's
weights, the host's would be wrong by as much as the memory's rate is."""
UNDISTURBED: Final = 0.9
"""Of their cores, that the threads have of a machine that nobody else uses."""
_OF_NARROW: Final = f"a model that is {NARROW.dim} wide"
_REPEATS: Final = 3
_processor_s: Final = time.process_time
"""Of all threads."""
_STREAM = StreamCase(message_bytes=1 << 20, num_messages=256)


def calibrate(
    dtype: torch.dtype, *, seed: int = 0, with_stream: bool = True, tell: Callable[[str], object] = lambda _: None
) -> Machine:
    """This machine, as the best of a few rounds in which all parts take turns.

    Args:
        dtype: of the prefills.
        seed: of all inputs.
        with_stream: also start a KV stream over loopback, which takes some seconds more.
        tell: told if others used the machine.
    """
    config, tile_tokens = preset(PRESET), defaults.TILE_TOKENS
    held = KeysValues.random(KvFormat.of(config, dtype), tile_tokens, seed)
    layer = SampledLayer(config, dtype, held, tile_tokens=tile_tokens, seed=seed)
    read = read_ceiling()
    one_row, decode = _one_row(dtype, seed), _decode_layer(dtype, seed)
    attend = _attention(config, dtype, seed)
    turns: dict[str, list[float]] = {"layer": [], "attention": [], "memory": [], "step": [], "decode": []}
    used_s, had_s = 0.0, 0.0
    for _ in range(ROUNDS):
        turns["layer"].append(sum(layer.time(0, tile_tokens)))
        began_s = _processor_s()
        turns["attention"].append(attend())
        used_s, had_s = used_s + _processor_s() - began_s, had_s + turns["attention"][-1] * torch.get_num_threads()
        turns["memory"].append(read()["gb_per_s"])
        turns["step"].append(one_row())
        turns["decode"].append(decode())
    seen = {name: (max if name == "memory" else min)(values) for name, values in turns.items()}
    attention_flops = causal_attention_flops(
        num_queries=tile_tokens, num_keys=_KEYS, num_heads=config.chains[0], head_dim=config.head_dim
    )
    attention, memory = attention_flops / seen["attention"] / 1e9, seen["memory"]
    environs = environment()
    cpu = f"{environs['cpu']} (family {environs['cpu_family']}, model {environs['cpu_model']})"
    if (share := used_s / had_s) < UNDISTURBED:
        tell(f"others used this machine: its threads had {share:.0%} of their cores, so the rates are too low")
    measured = f"measured: commit {environs['commit'][:7]}, threads that had {share:.0%} of their cores"
    return Machine(
        name=f"{cpu}, {environs['threads']} threads, {short(dtype)}",
        gemm_gflops_per_s=_rounded(_gemm_rate(config, tile_tokens, seen["layer"], attention, memory, seen["step"])),
        attention_gflops_per_s=_rounded(attention),
        memory_gb_per_s=_rounded(memory),
        step_s=_rounded(seen["step"]),
        decode_step_s=_rounded(seen["decode"]),
        overlaps_host=False,
        stream_gb_per_s=_rounded(_stream(seed)) if with_stream else None,
        sources={
            "gemm_gflops_per_s": f"{measured}; a {tile_tokens}-token tile of a {PRESET} layer, less its other parts",
            "attention_gflops_per_s": f"{measured}; {tile_tokens} queries over {_KEYS} keys of {PRESET}",
            "memory_gb_per_s": f"{measured}; a sum over 256 MiB",
            "step_s": f"{measured}; a tile of one token of a layer of {_OF_NARROW}, module by module",
            "decode_step_s": f"{measured}; a decode step of {_OF_NARROW}, by its layers",
            "stream_gb_per_s": f"{measured}; one KV stream over loopback, messages of 1 MiB",
        },
    )


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _gemm_rate(
    config: ChainConfig, tile_tokens: int, layer_s: float, attention: float, memory: float, step_s: float
) -> float:
    """What a tile's products reach, when its other parts are as the model has them."""
    (tile,) = Prompt(config=config, num_tokens=tile_tokens, tile_tokens=tile_tokens).tiles()
    others_s = step_s
    flops = 0.0
    for half in (tile.keys_values, tile.rest):
        flops += half.linear_flops
        others_s += half.attention_flops / (attention * 1e9) + half.moved_bytes / (memory * 1e9)
    # On a busy machine the parts may come out longer than the whole.
    return flops / max(layer_s - others_s, layer_s / 4) / 1e9


def _one_row(dtype: torch.dtype, seed: int) -> Callable[[], float]:
    held = KeysValues.random(KvFormat.of(NARROW, dtype), 1, seed)
    layer = SampledLayer(NARROW, dtype, held, tile_tokens=1, seed=seed)
    return lambda: min(sum(layer.time(0, 1)) for _ in range(_REPEATS))


def _decode_layer(dtype: torch.dtype, seed: int) -> Callable[[], float]:
    layout = KvLayout(KvFormat.of(NARROW, dtype), defaults.PAGE_TOKENS)
    checkpoint = RandomCheckpoint.of("narrow", RepeatedWeights(config=NARROW, dtype=dtype, seed=seed))
    engine = DecodeEngine(checkpoint, KvStore(layout, 1), weights=WeightLayout(dtype=dtype))
    plan = StepPlan((PlanRow((1,), 0, NARROW.num_chains, np.zeros(1, dtype=np.int32)),))

    def turn() -> float:
        began_s = time.perf_counter()
        engine.step(plan)
        return (time.perf_counter() - began_s) / NARROW.num_layers

    return lambda: min(turn() for _ in range(_REPEATS))


def _attention(config: ChainConfig, dtype: torch.dtype, seed: int) -> Callable[[], float]:
    held = KeysValues.random(KvFormat.of(config, dtype), _KEYS, seed)
    q_THE = torch.randn(defaults.TILE_TOKENS, config.chains[0], config.head_dim).to(dtype)

    def turn() -> float:
        start = time.perf_counter()
        prefill_attention(q_THE, held.k_KNE, held.v_KNE)
        return time.perf_counter() - start

    return turn


def _stream(seed: int) -> float:
    with _STREAM.contest(seed) as contest:
        return max(contest.contenders["ours"]()["gb_per_s"] for _ in range(3))
