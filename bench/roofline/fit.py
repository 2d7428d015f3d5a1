"""The paper's machine: three numbers, fitted to its two baseline rows; every chained row is held out.

Fitted are the rate of products, the rate of attention and the host's time of a layer. What a layer computes and moves
is counted, and the memory's rate is the data sheet's.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Final

from bench.paper import PaperCell, load
from bench.roofline.machine import Machine
from bench.roofline.model import Prompt, Tile, prefill_s

LONG_TOKENS: Final = 64 << 10
"""From here on the paper's times are bound by work rather than by launches."""
FITTED: Final = ("gemm_gflops_per_s", "attention_gflops_per_s", "step_s")
_START: Final[tuple[float, ...]] = (150e3, 150e3, 2e-3)
_FACTORS: Final = (1.3, 1.1, 1.03, 1.01, 1.003, 1.001)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """A cell of the paper beside the model's."""

    cell: PaperCell
    seconds: float
    is_fitted: bool

    @property
    def error(self) -> float:
        """Of the prediction, as a share of the paper's time; negative where it is too short."""
        return self.seconds / self.cell.seconds - 1


def prompt_of(cell: PaperCell) -> Prompt:
    """As the paper ran it: a model's ordinary forward, the whole prompt at once."""
    return Prompt(config=cell.config, num_tokens=cell.num_tokens, is_last_layer_whole=True)


def is_fitted(cell: PaperCell) -> bool:
    """Whether the three numbers come from this cell."""
    return cell.kind == "baseline"


def predictions(machine: Machine) -> list[Prediction]:
    """Every dense cell that the paper does not have wrong."""
    return [
        Prediction(cell=cell, seconds=prefill_s(machine, prompt_of(cell)), is_fitted=is_fitted(cell))
        for cell in load().cells.values()
        if cell.attention == "dense" and not cell.suspect
    ]


def mean_error(predicted: Iterable[Prediction]) -> float:
    """Mean of the errors' sizes."""
    errors = [abs(each.error) for each in predicted]
    return sum(errors) / len(errors)


def fit(machine: Machine) -> Machine:
    """The machine with the three numbers that make the mean absolute error over the fitted cells least.

    Each number is moved up and down by a factor, alone and together, for as long as that helps; then by a smaller one.
    """
    cells = [each for each in load().cells.values() if each.attention == "dense" and is_fitted(each)]
    known = [(cell.seconds, cell.config.num_layers, next(prompt_of(cell).tiles())) for cell in cells]
    values, error = _START, _error(_with(machine, _START), known)
    for factor in _FACTORS:
        is_better = True
        while is_better:
            is_better = False
            for powers in product((-1, 0, 1), repeat=len(values)):
                near = tuple(value * factor**power for value, power in zip(values, powers, strict=True))
                if (found := _error(_with(machine, near), known)) < error:
                    values, error, is_better = near, found, True
    return _with(machine, tuple(float(f"{value:.3g}") for value in values))


def _with(machine: Machine, values: Sequence[float]) -> Machine:
    gemm, attention, step_s = values
    return replace(machine, gemm_gflops_per_s=gemm, attention_gflops_per_s=attention, step_s=step_s)


def _error(machine: Machine, known: Sequence[tuple[float, int, Tile]]) -> float:
    errors = []
    for seconds, num_layers, tile in known:
        layer_s = machine.step_seconds(machine.seconds(tile.keys_values) + machine.seconds(tile.rest))
        errors.append(abs(num_layers * layer_s / seconds - 1))
    return sum(errors) / len(errors)
