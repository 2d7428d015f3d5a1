"""The model of other machines in tables: its errors against the paper, and what it says of this system."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import paper
from bench.harness.markdown import table
from bench.harness.units import digits, duration, length
from bench.roofline.fit import LONG_TOKENS, Prediction, mean_error, predictions
from bench.roofline.machine import Machine, machine
from bench.roofline.model import Prompt, first_step_s, prefill_s, streamed_s
from colm.model.presets import preset

GPU_TILE_TOKENS: Final = 8192
"""A tile that keeps a GPU busy for longer than its host needs for a step; the CPU's default is for a CPU."""
LINKS_GBIT_PER_S: Final = (25, 100, 400)
PRESETS: Final = tuple(
    f"{name}{chains}" for name in ("llama-3.2-1b", "llama-3.1-8b") for chains in ("", "-16-16-air", "-8-8-8-8-air")
)
LENGTHS: Final = tuple(2 << power for power in range(10, 20))
SHOWN_LENGTHS: Final = tuple(2 << power for power in (10, 12, 14, 16, 19))
BOUND_BY_STREAM: Final = 1.05
"""The stream is called the bound where it makes the time to the first token longer by this factor."""
STREAM_RECORD: Final = Path("bench/results/kv_stream.json")
_ROOT: Final = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A time to the first token, alone and behind each link."""

    without_s: float
    with_s: Sequence[float]

    @property
    def is_bound(self) -> list[bool]:
        """By the stream, for each link."""
        return [each > BOUND_BY_STREAM * self.without_s for each in self.with_s]


def answer(target: Machine, name: str, num_tokens: int, links_gb_per_s: Sequence[float]) -> Answer:
    """Prefill, the stream beside it, and the decode node's first step, all on one kind of machine."""
    config = preset(name)
    prompt = Prompt(config=config, num_tokens=num_tokens - 1, tile_tokens=GPU_TILE_TOKENS)
    step_s = first_step_s(target, config, num_tokens)
    return Answer(
        without_s=prefill_s(target, prompt) + step_s,
        with_s=[streamed_s(target, prompt, gb_per_s * 1e9) + step_s for gb_per_s in links_gb_per_s],
    )


def stream_today_gb_per_s() -> float:
    """One KV stream of this system, as the record has it: messages of 1 MiB over loopback, without TLS."""
    record = json.loads((_ROOT / STREAM_RECORD).read_text(encoding="utf-8"))
    (case,) = (each for each in record["cases"] if each["shape"].get("message_bytes") == 1 << 20)
    return float(case["metrics"]["ours_gb_per_s"]["median"])


def error_table(predicted: Sequence[Prediction]) -> str:
    """Errors of all dense cells, a row a preset."""
    by_key = {each.cell.key: each for each in predicted}
    cells = paper.load().cells

    def shown(name: str, num_tokens: int) -> str:
        found = by_key.get((name, "dense", num_tokens))
        if found is None:
            return "wrong" if (name, "dense", num_tokens) in cells else ""
        return f"{found.error:+.0%}" + ("*" if found.is_fitted else "")

    rows = [[name, *(shown(name, each) for each in LENGTHS)] for name in paper.load().rows]
    return table(["preset", *map(length, LENGTHS)], rows)


def summary_table(predicted: Sequence[Prediction]) -> str:
    """Mean and largest error, of fitted and held-out cells, long and short."""
    rows = []
    for label, is_fitted in (("fitted", True), ("held out", False)):
        for where, is_long in (("64K and above", True), ("below 64K", False)):
            found = [
                each
                for each in predicted
                if each.is_fitted == is_fitted and (each.cell.num_tokens >= LONG_TOKENS) == is_long
            ]
            worst = max(found, key=lambda each: abs(each.error))
            rows.append([label, where, str(len(found)), f"{mean_error(found):.1%}", f"{worst.error:+.0%}"])
    return table(["cells", "length", "number", "mean absolute error", "largest"], rows)


def first_token_table(target: Machine) -> str:
    """Time to the first token of a few presets, without the stream and behind each link."""
    today = stream_today_gb_per_s()
    links = [*(each / 8 for each in LINKS_GBIT_PER_S), today]
    rows = []
    for name in PRESETS:
        for num_tokens in SHOWN_LENGTHS:
            found = answer(target, name, num_tokens, links)
            behind = [
                f"**{duration(each)}**" if is_bound else duration(each)
                for each, is_bound in zip(found.with_s, found.is_bound, strict=True)
            ]
            rows.append([name, length(num_tokens), duration(found.without_s), *behind])
    links_head = [f"{each} Gb/s" for each in LINKS_GBIT_PER_S]
    return table(["preset", "prompt", "no stream", *links_head, f"{digits(today)} GB/s"], rows)


def bound_table(targets: Iterable[Machine]) -> str:
    """Up to which length the stream, rather than computing, is the bound."""
    today = stream_today_gb_per_s()
    links = [*(each / 8 for each in LINKS_GBIT_PER_S), today]
    rows = []
    for target in targets:
        for name in PRESETS:
            bound = [answer(target, name, num_tokens, links).is_bound for num_tokens in LENGTHS]
            cells = []
            for link in zip(*bound, strict=True):
                lengths = [length(each) for each, is_bound in zip(LENGTHS, link, strict=True) if is_bound]
                cells.append(f"{lengths[0]} to {lengths[-1]}" if lengths else "never")
            rows.append([f"{target.name}, {name}", *cells])
    links_head = [f"{each} Gb/s" for each in LINKS_GBIT_PER_S]
    return table(["machine, preset", *links_head, f"{digits(today)} GB/s"], rows)


def machine_table(targets: Iterable[Machine]) -> str:
    """Rates of the machines; the files have the sources."""
    rows = [
        [
            target.name,
            f"{digits(target.gemm_gflops_per_s / 1e3)} TFLOP/s",
            f"{digits(target.attention_gflops_per_s / 1e3)} TFLOP/s",
            f"{digits(target.memory_gb_per_s)} GB/s",
            duration(target.step_s),
        ]
        for target in targets
    ]
    return table(["machine", "products", "attention", "memory", "host, a step"], rows)


def page() -> str:
    """docs/machines.md, whole."""
    as_paper, a100, h100 = (machine(each) for each in ("a100-paper", "a100", "h100"))
    predicted = predictions(as_paper)
    return f"""# What other machines would take

Modelled, all of it; this project has run on none of these GPUs. `python -m bench.roofline --write-docs` writes this
page. Model: `bench/roofline/model.py`. Machines, each number with its source: `bench/roofline/machines/`. The paper's
times: `bench/paper/prefill_tables.json`. One KV stream's rate: [record](../{STREAM_RECORD}).

A step is a tile of a layer. It takes the device: the operations of its products and of its causal attention, each at a
rate, and the bytes that its other operations move, at the memory's rate. It takes the host a fixed time, beside the
device's. The paper's software takes a prompt as one tile and its last layer whole; this system leaves that layer's
attention and feed-forward out.

{machine_table([as_paper, a100, h100])}
## Against the paper

Three numbers are fitted, to the 20 cells of the two baselines: the rates of products and of attention, and the host's
time. The 12 chained rows are held out. Error is predicted over published time, less one.

{summary_table(predicted)}
{error_table(predicted)}
`*` fitted; "wrong": the paper's figure is not used, `bench/paper/prefill_tables.json` says why. The model has one rate
for all widths: cells of narrow chains at 8K to 32K come out too short, and those of head dim 128 at 128K too long.

## Time to the first token of this system

Prefill in tiles of {length(GPU_TILE_TOKENS)}, the KV stream beside it with its window of 64 MiB, then the first step of
a decode node on a machine of the same kind, with all chains. Keys and values in bf16. A link carries its nominal rate.
The last column is what one stream of this system reached over loopback on two CPU cores. Bold: the stream makes it more
than {BOUND_BY_STREAM - 1:.0%} longer.

### A100

{first_token_table(a100)}
### H100

{first_token_table(h100)}
## Where the stream is the bound

Lengths, of 2K to 1M, at which the stream makes the time to the first token more than {BOUND_BY_STREAM - 1:.0%} longer.

{bound_table([a100, h100])}"""
