"""What one step's sampling costs: `python -m bench.sampler --json`.

`choose` against sorting each row's whole vocabulary, which is how a draw is usually written down. The logits are
normal, with tens of thousands of tokens in the nucleus of top_p, or those of probabilities that fall like rank^-1.5,
with hundreds, as a language model's do. First, what is drawn must be among the tokens that sorting keeps.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from bench.record import environment
from colm.sampling import SamplingParams
from decode_node.sampler import Sampler, choose

SEED = 0
CASES = {
    "greedy": SamplingParams(seed=SEED),
    "top_k=50": SamplingParams(seed=SEED, temperature=1.0, top_k=50),
    "top_p=0.95": SamplingParams(seed=SEED, temperature=1.0, top_p=0.95),
    "temperature": SamplingParams(seed=SEED, temperature=1.0),
}


def logits(kind: str, num_rows: int, vocab_size: int) -> Tensor:
    """logits_RV of normal numbers, or of probabilities that fall like rank^-1.5, in random order."""
    generator = torch.Generator().manual_seed(SEED)
    if kind == "normal":
        return 2 * torch.randn(num_rows, vocab_size, generator=generator)
    falling = -1.5 * torch.arange(1, vocab_size + 1).log()
    return torch.stack([falling[torch.randperm(vocab_size, generator=generator)] for _ in range(num_rows)])


def by_sorting(params: SamplingParams, logits_V: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One row's token and the tokens that could have been drawn."""
    logprobs_V = logits_V.log_softmax(dim=0)
    if params.temperature == 0:
        token_id = logprobs_V.argmax()
        return token_id, token_id[None]
    ordered, ids = logprobs_V.sort(descending=True, stable=True)
    probabilities = (ordered[: params.top_k or None].double() / params.temperature).softmax(dim=0)
    before = probabilities.cumsum(dim=0) - probabilities
    probabilities = probabilities * (before < params.top_p)
    return ids[torch.multinomial(probabilities, 1, generator=generator)], ids[: int((probabilities > 0).sum())]


def sort_rows(params: SamplingParams, logits_RV: Tensor, generator: torch.Generator) -> list[int]:
    """A step's tokens, row by row."""
    return [int(by_sorting(params, row_V, generator)[0]) for row_V in logits_RV]


def check(params: SamplingParams, logits_RV: Tensor) -> None:
    """What `choose` draws is among the tokens that sorting keeps.

    Raises:
        AssertionError: it is not.
    """
    for row_V in logits_RV:
        (choice,) = choose([Sampler(params)], row_V[None])
        _, kept = by_sorting(params, row_V, torch.Generator())
        assert choice.token_id in kept, f"{params} drew a token that sorting does not keep"  # type: ignore[union-attr]


def elapsed_ms(step: Callable[[], object]) -> float:
    """One call's time."""
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Check, measure in turn, print; with --json the record as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab-size", type=int, default=128_000)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print the record as the last line")
    options = parser.parse_args()
    metrics = {}
    for kind in ("normal", "falling"):
        for name, params in CASES.items():
            for num_rows in options.rows:
                logits_RV = logits(kind, num_rows, options.vocab_size)
                check(params, logits_RV[:2])
                samplers = [Sampler(params) for _ in range(num_rows)]
                generator = torch.Generator().manual_seed(SEED)
                contenders: dict[str, Callable[[], object]] = {
                    "sorting_ms": partial(sort_rows, params, logits_RV, generator),
                    "choose_ms": partial(choose, samplers, logits_RV),
                }
                runs = [{key: elapsed_ms(step) for key, step in contenders.items()} for _ in range(options.rounds + 1)]
                seen = {key: sorted(run[key] for run in runs[1:]) for key in contenders}  # the first run warms up
                spread = {key: {"median": median(ms), "min": ms[0], "max": ms[-1]} for key, ms in seen.items()}
                metrics[f"{name}, {kind} logits, {num_rows} rows"] = spread
                cells = (f"{key} {ms['median']:8.2f} [{ms['min']:.2f}..{ms['max']:.2f}]" for key, ms in spread.items())
                sys.stdout.write(f"{name:12s} {kind:8s} {num_rows:3d} rows  {'  '.join(cells)}\n")
    if options.json:
        command = " ".join(["python", "-m", "bench.sampler", *sys.argv[1:]])
        shape = {"vocab_size": options.vocab_size, "dtype": "float32", "rounds": options.rounds}
        record = environment(command, SEED) | {"shape": shape, "metrics": metrics}
        sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
