"""What a cluster for a model takes: bytes and pages, counted, and seconds a token, modelled."""

from typing import Final

import torch

from bench.harness.markdown import table
from bench.harness.units import duration, length
from bench.roofline.machine import Machine, machine
from bench.roofline.model import ELEMENT_BYTES, Prompt, first_step_s, prefill_s
from bench.roofline.tables import GPU_TILE_TOKENS, PRESETS
from cluster.cli.output import human_bytes
from colm import defaults
from colm.checkpoint import prefill_tensor_names
from colm.kv import KvFormat
from colm.model import num_parameters, parameter_shapes
from colm.model.config import ChainConfig
from colm.model.presets import preset
from colm.model.transformer import slice_config
from decode_node.kv_layout import KvLayout

ANSWER_TOKENS: Final = 256
"""Of an answer whose client sets no limit."""
PROMPTS: Final = (8 << 10, 128 << 10)
BASES: Final = tuple(name for name in PRESETS if len(preset(name).chains) == 1)
"""A model in chains has the same keys and values: its first chain makes them."""
_MACHINES: Final = ("cpu", "a100", "h100")


def prefill_weight_bytes(config: ChainConfig) -> int:
    """Of a prefill replica, in bf16."""
    needed = prefill_tensor_names(config)
    return sum(shape.numel() for name, shape in parameter_shapes(config, 1).items() if name in needed) * ELEMENT_BYTES


def weight_table() -> str:
    """Weights of a replica of each role."""
    rows = []
    for name in PRESETS:
        config = preset(name)
        decode_bytes = num_parameters(config) * ELEMENT_BYTES
        rows.append([name, human_bytes(prefill_weight_bytes(config)), human_bytes(decode_bytes)])
    return table(["model", "a prefill replica", "a decode replica"], rows)


def page_table() -> str:
    """Bytes and pages of keys and values."""
    rows = []
    for name in BASES:
        for cache_dtype in ("model", "int8"):
            layout = KvLayout(KvFormat.of(preset(name), torch.bfloat16), defaults.PAGE_TOKENS, cache_dtype)
            num_pages = layout.pages_within(defaults.KV_CACHE_BYTES)
            rows.append(
                [
                    f"{name}, in chains or not",
                    layout.page_format,
                    human_bytes(layout.page_bytes // layout.page_tokens),
                    human_bytes(layout.page_bytes),
                    f"{num_pages:,} pages, {num_pages * layout.page_tokens:,} tokens",
                    *(str(num_pages // layout.pages(prompt + ANSWER_TOKENS)) for prompt in PROMPTS),
                ]
            )
    held = human_bytes(defaults.KV_CACHE_BYTES)
    return table(
        ["model", "pages of", "a token", "a page", f"{held} hold", *(f"prompts of {length(each)}" for each in PROMPTS)],
        rows,
    )


def time_table(target: Machine) -> str:
    """Seconds of a prompt token and of a new token, one request alone."""
    rows, tile_tokens = [], GPU_TILE_TOKENS if target.overlaps_host else defaults.TILE_TOKENS
    for name in PRESETS:
        config = preset(name)
        cells = []
        for num_tokens in PROMPTS:
            prompt = Prompt(config=config, num_tokens=num_tokens, tile_tokens=tile_tokens)
            cells += [
                duration(prefill_s(target, prompt) / num_tokens),
                duration(first_step_s(target, slice_config(config, 1), num_tokens)),
                duration(first_step_s(target, config, num_tokens)),
            ]
        rows.append([name, *cells])
    heads = [f"{each}, {length(prompt)}" for prompt in PROMPTS for each in ("prompt token", "new, chain 1", "new, all")]
    return table(["model", *heads], rows)


def page() -> str:
    """docs/sizing.md, whole."""
    targets = [machine(name) for name in _MACHINES]
    times = "\n".join(f"### {target.name}\n\n{time_table(target)}" for target in targets)
    files = ", ".join(f"[{name}.toml](../bench/roofline/machines/{name}.toml)" for name in _MACHINES)
    return f"""# Sizing, model by model

For the paper's models; `colm inspect MODEL` prints what the sums need of another one.
[operate.md](operate.md#how-large) says what else takes memory, and which pool is too small. Times are modelled on
{files}. `python -m bench.roofline --write-docs` writes this page.

## Weights

In bf16. Of those that a decode step multiplies, `weights = "int8"` or `"q4"` in `[decode]` takes 8.5 or 5 bits, not 16.

{weight_table()}
## Pages

Pages of {defaults.PAGE_TOKENS} tokens. A request takes whole pages for its prompt and its longest answer, here
{ANSWER_TOKENS} tokens, before it begins; the last columns say how many of such requests fit at once. Prompts that begin
alike share their first pages.

{page_table()}
## Seconds a token

Modelled, as [machines.md](machines.md) says; this project has run on none of these GPUs. One request alone: a batch of
answers reads the weights once for all of them, and prompts take turns. A new token's time is that of its step at that
context.

The CPU's rates are measured, on the one processor that its table names. A prompt's times by them are within 15% of
[the record](../bench/results/prefill.jsonl) of prefills on it. A new token takes what reading memory takes, whose rate
on that virtual machine changes by 2x within an hour. For another processor, on a machine that does nothing else:

```
python -m bench.roofline --calibrate > cpu.toml && mv cpu.toml bench/roofline/machines/
python -m bench.roofline --write-docs
```

It says on stderr if others took part of the cores; all rates are then too low.

{times}
## From load to replicas

A pool is busy for the share *requests a second, times seconds a request, by replicas* of its time. A prompt takes a
prefill replica its tokens times the table's prompt token; an answer takes a decode replica its tokens times a step,
which it shares with up to `max_batch_size` others. Above 0.7, lines grow long, and another replica pays.
"""
