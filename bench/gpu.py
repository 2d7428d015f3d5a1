"""What a GPU makes of the kernels and of both engines: `python -m bench.gpu --json`.

Each kernel is held to its definition, then timed beside what limits it: a matrix product, or a copy within the GPU's
memory. The prefill engine reads whole prompts at the shapes of the paper's tables, from an engine whose keys and values
were held to the model's definition; `over_baseline` is how many times faster than the tables' ordinary model it is,
`paper_` what the paper has there. All weights are random. A cell that fails says why, and the others go on.

Shapes: as in the kernels; L layers, B pages, P tokens of a page, K kv heads, D head dim, M pages of a request.
"""

import shlex
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from json import dumps

import numpy as np
import torch
from colm_kernels import tolerance
from colm_kernels.chain_linear import chain_linear
from colm_kernels.decode_attention import decode_attention
from colm_kernels.prefill_attention import prefill_attention
from colm_kernels.sparse_index import SparseIndex
from colm_kernels.sparse_prefill_attention import sparse_prefill_attention
from torch.nn import functional as F

from bench import paper
from bench.decode.loaded import fill_with_noise
from bench.harness.environment import environment
from bench.harness.suite import Options, arguments
from bench.harness.units import length
from bench.kernels.decode import DecodeCase
from bench.kernels.prefill import CHECKED_ROWS, PrefillCase
from bench.kernels.sparse import SparseCase, last_row_block
from bench.kernels.staircase import StaircaseCase
from bench.peers.weights import RepeatedWeights
from bench.prefill.case import check_engine, prompt
from bench.random_weights import RandomCheckpoint
from colm.defaults import PAGE_TOKENS
from colm.flops import prefill_flops
from colm.kv import KvFormat
from colm.model.presets import preset
from decode_node.engine import DecodeEngine
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from decode_node.plan import PlanRow, StepPlan
from prefill_node.engine import PrefillEngine

GPU = torch.device("cuda")
TILE_TOKENS = 8192
LENGTHS = [2 << 10 << doubled for doubled in range(10)]
WARM_UP_RUNS = 2

Metrics = dict[str, float]
Cell = Callable[[int, int], Metrics]
"""From a seed and a number of rounds."""


def seconds(run: Callable[[], object], rounds: int, warm_up_runs: int = WARM_UP_RUNS) -> float:
    """Median time of a run and all that it launches, behind some that are not counted."""
    times = []
    for turn in range(warm_up_runs + rounds):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if turn >= warm_up_runs:
            times.append(time.perf_counter() - began_s)
    return statistics.median(times)


@torch.inference_mode()
def gemm(seed: int, rounds: int) -> Metrics:
    """A large matrix product of bf16: what products are held against."""
    generator = torch.Generator(GPU).manual_seed(seed)
    x, weight = (torch.randn(8192, 8192, device=GPU, dtype=torch.bfloat16, generator=generator) for _ in range(2))
    return {"tflops_per_s": 2 * 8192**3 / seconds(lambda: F.linear(x, weight), rounds) / 1e12}


def copy(seed: int, rounds: int) -> Metrics:
    """A copy within the GPU's memory, bytes read and written: what memory-bound kernels are held against."""
    source = torch.full((4 << 30,), seed, dtype=torch.uint8, device=GPU)
    target = torch.empty_like(source)
    return {"gb_per_s": 2 * source.nbytes / seconds(lambda: target.copy_(source), rounds) / 1e9}


def dense(case: PrefillCase, seed: int, rounds: int) -> Metrics:
    """Our kernel, and PyTorch's own attention where the tile is the whole prompt."""
    on_host = case.inputs(seed)
    expected = tolerance.prefill_attention(on_host[0][-CHECKED_ROWS:], *on_host[1:])
    q, k, v = (each.to(GPU) for each in on_host)
    run = partial(prefill_attention, q, k, v, backend="triton")
    tolerance.check_all(expected, (part[-CHECKED_ROWS:].cpu() for part in run()))
    found = {"tflops_per_s": case.flops / seconds(run, rounds) / 1e12}
    if case.num_queries == case.num_keys:
        q_BHTD, k_BKSD, v_BKSD = q.transpose(0, 1)[None].contiguous(), k[None], v[None]

        def sdpa() -> object:
            return F.scaled_dot_product_attention(q_BHTD, k_BKSD, v_BKSD, is_causal=True, enable_gqa=True)

        found["sdpa_tflops_per_s"] = case.flops / seconds(sdpa, rounds) / 1e12
    return found


def sparse(case: SparseCase, seed: int, rounds: int) -> Metrics:
    """Our sparse kernel beside our dense one."""
    index = case.index(seed)
    density, last, index = index.density(), last_row_block(index), _on_gpu(index)
    q, k, v = case.dense.inputs(seed)
    expected = tolerance.prefill_attention(q[-last.tiling.num_queries :], k, v, last)
    q, k, v = (each.to(GPU) for each in (q, k, v))
    found = sparse_prefill_attention(q, k, v, index)
    tolerance.check_all(expected, (part[-last.tiling.num_queries :].cpu() for part in found))
    sparse_s = seconds(lambda: sparse_prefill_attention(q, k, v, index), rounds)
    dense_s = seconds(lambda: prefill_attention(q, k, v, backend="triton"), rounds)
    rate = case.dense.flops * density / sparse_s / 1e12
    return {"density": density, "tflops_per_s": rate, "over_dense": dense_s / sparse_s}


def _on_gpu(index: SparseIndex) -> SparseIndex:
    names = ("block_offsets", "block_ids", "column_offsets", "column_ids")
    return replace(index, **{name: getattr(index, name).to(GPU) for name in names})


def decode(case: DecodeCase, seed: int, rounds: int) -> Metrics:
    """Our paged attention; its bytes are keys, values and scales."""
    on_host, options = case.inputs(seed)
    expected = tolerance.decode_attention(*on_host, **options, weights_dtype=on_host[0].dtype)
    q, k_pages, v_pages, block_table, context_lens = (each.to(GPU) for each in on_host)
    options = {name: each.to(GPU) for name, each in options.items()}
    run = partial(decode_attention, q, k_pages, v_pages, block_table, context_lens, **options)
    expected.check(run().cpu())
    return {"gb_per_s": case.num_bytes / seconds(run, rounds) / 1e9}


@torch.inference_mode()
def staircase(case: StaircaseCase, seed: int, rounds: int) -> Metrics:
    """Our Linear (chain), operations with zeros left out, beside a product a chain."""
    x, weights, _ = case.inputs(seed)
    last = x[-CHECKED_ROWS:]
    expected = tolerance.linear(last, weights, None, (len(last),) * len(weights))
    x, weights = x.to(GPU), [weight.to(GPU) for weight in weights]
    run = partial(chain_linear, x, weights, None, (len(x),) * len(weights))
    expected.check(run()[-CHECKED_ROWS:].cpu())

    def separate() -> object:
        return torch.cat([F.linear(x[:, : weight.shape[1]], weight) for weight in weights], dim=1)

    ours_s, separate_s = seconds(run, rounds), seconds(separate, rounds)
    return {"tflops_per_s": case.flops / ours_s / 1e12, "over_separate": separate_s / ours_s}


def prefill(name: str, lengths: Sequence[int], seed: int, rounds: int) -> Metrics:
    """Whole prompts through the engine; from 64K on once each, behind the shorter ones."""
    config = preset(name)
    check_engine(config, torch.bfloat16, 256, seed, GPU)
    weights = RepeatedWeights(config=config, dtype=torch.bfloat16, seed=seed)
    engine = PrefillEngine(weights, KvFormat.of(config, torch.bfloat16), tile_tokens=TILE_TOKENS, device=GPU)
    found: Metrics = {}
    for num_tokens in lengths:
        token_ids = prompt(config, num_tokens, seed)
        run = partial(lambda ids: deque(engine.run(ids), maxlen=0), token_ids)
        taken_s = seconds(run, 1, warm_up_runs=0) if num_tokens >= 64 << 10 else seconds(run, rounds)
        found[f"{length(num_tokens)}_s"] = taken_s
        found[f"{length(num_tokens)}_tflops_per_s"] = prefill_flops(config, num_tokens) / taken_s / 1e12
    return found


@torch.inference_mode()
def step(name: str, context_len: int, num_answers: int, seed: int, rounds: int) -> Metrics:
    """Steps of the decode engine over pages of noise, at every scale."""
    weights = RepeatedWeights(config=preset(name), dtype=torch.bfloat16, seed=seed)
    kv_format = KvFormat.of(weights.config, torch.bfloat16)
    each = -(-context_len // PAGE_TOKENS)
    store = KvStore(KvLayout(kv_format, PAGE_TOKENS), num_answers * each, GPU)
    fill_with_noise(store.k_pages_LBPKD, store.v_pages_LBPKD)
    engine = DecodeEngine(RandomCheckpoint.of(name, weights), store)
    tables = np.random.default_rng(seed).permutation(num_answers * each).astype(np.int32).reshape(num_answers, each)
    found = {}
    for num_chains in range(1, len(weights.config.chains) + 1):
        plan = StepPlan(tuple(PlanRow((1,), context_len - 1, num_chains, table_M) for table_M in tables))
        found[f"scale_{num_chains}_s"] = seconds(partial(engine.step, plan), rounds)
    return found


def cells(most_tokens: int, most_tokens_8b: int) -> Iterator[tuple[str, Cell]]:
    """All cells, by name; those that say most come first."""
    yield "gemm_bf16", gemm
    yield "copy", copy
    for family, most in (("llama-3.2-1b", most_tokens), ("llama-3.1-8b", most_tokens_8b)):
        for chains in ("-8-8-8-8-air", "-16-16-air", ""):
            yield (
                f"prefill {family}{chains}",
                partial(prefill, family + chains, [each for each in LENGTHS if each <= most]),
            )
    denses = [
        PrefillCase(num_queries=8192, num_keys=num_keys, num_heads=32, num_kv_heads=8, head_dim=head_dim)
        for num_keys, head_dim in ((8192, 64), (8192, 128), (131072, 64), (131072, 128))
    ]
    yield from ((each.name, partial(dense, each)) for each in denses)
    sparses = [
        SparseCase(dense=denses[2], pattern="blocks", density=0.05),
        SparseCase(dense=denses[2], pattern="vertical_slash", density=0.05),
    ]
    yield from ((each.name, partial(sparse, each)) for each in sparses)
    decodes = [
        DecodeCase(batch=batch, context_len=context_len, num_kv_heads=8, group=4, head_dim=64, int8_pages=int8_pages)
        for batch, context_len in ((1, 8192), (1, 131072), (16, 8192), (8, 65536))
        for int8_pages in (False, True)
    ]
    yield from ((each.name, partial(decode, each)) for each in decodes)
    staircases = [
        StaircaseCase(num_rows=num_rows, dim=dim, chains=(8, 8, 8, 8))
        for num_rows, dim in ((8192, 4096), (8192, 2048), (16, 2048))
    ]
    yield from ((each.name, partial(staircase, each)) for each in staircases)
    for num_answers in (1, 16, 64):
        yield (
            f"step llama-3.2-1b-8-8-8-8-air {length(8192)} x{num_answers}",
            partial(step, "llama-3.2-1b-8-8-8-8-air", 8192, num_answers),
        )


def speed_ups(found: dict[str, Metrics]) -> dict[str, Metrics]:
    """Of the prefills over their baselines, by length, beside the paper's."""
    tables, ratios = paper.load(), dict[str, Metrics]()
    for model, baseline in tables.rows.items():
        ours, theirs = found.get(f"prefill {model}", {}), found.get(f"prefill {baseline}", {})
        for num_tokens in [] if model == baseline else LENGTHS:
            key, paper_ratio = f"{length(num_tokens)}_s", tables.speedup(model, "dense", num_tokens)
            if key in ours and key in theirs:
                ratios.setdefault(model, {})[length(num_tokens)] = theirs[key] / ours[key]
                if paper_ratio is not None:
                    ratios[model][f"paper_{length(num_tokens)}"] = paper_ratio
    return ratios


class GpuOptions(Options):
    """Options of this benchmark."""

    only: str
    most_tokens: int
    most_tokens_8b: int


def main() -> None:
    """Run the cells whose names hold a text, and print each as it comes."""
    parser = arguments("bench.gpu", __doc__)
    parser.add_argument("--only", default="", help="cells whose name holds this")
    parser.add_argument("--most-tokens", type=int, default=128 << 10, help="of a prompt, 1B models")
    parser.add_argument("--most-tokens-8b", type=int, default=32 << 10, help="of a prompt, 8B models")
    options = parser.parse_args(namespace=GpuOptions())
    if not torch.cuda.is_available():
        parser.error("no GPU is to be seen here; bench.kernels and bench.prefill measure a CPU")
    found: dict[str, Metrics] = {}
    failed: dict[str, str] = {}
    for name, cell in cells(options.most_tokens, options.most_tokens_8b):
        if options.only not in name:
            continue
        began_s = time.perf_counter()
        try:
            found[name] = cell(options.seed, options.rounds)
            words = "  ".join(f"{metric} {value:.4g}" for metric, value in found[name].items())
        except Exception as err:  # noqa: BLE001 - the other cells go on, and this one says why it does not
            failed[name] = words = f"{type(err).__name__}: {str(err)[:600]}"
        torch.cuda.empty_cache()
        sys.stdout.write(f"{name}: {words}  ({time.perf_counter() - began_s:.1f} s)\n")
        sys.stdout.flush()
    gpu = torch.cuda.get_device_properties(GPU)
    record = {
        "command": shlex.join(["python", "-m", options.module, *sys.argv[1:]]),
        **environment(),
        "gpu": gpu.name,
        "gpu_bytes": gpu.total_memory,
        "cuda": torch.version.cuda,
        "tile_tokens": TILE_TOKENS,
        "seed": options.seed,
        "rounds": options.rounds,
        "cells": found,
        "failed": failed,
        "over_baseline": speed_ups(found),
    }
    if options.output is not None:
        options.output.write_text(dumps(record, indent=1) + "\n")
    if options.json:
        sys.stdout.write(dumps(record) + "\n")


if __name__ == "__main__":
    main()
