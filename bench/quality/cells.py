"""The cells of the experiment: a text of one length, prefilled with one kind of attention."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from bench.harness.units import length
from prefill_node.sparse.policy import SparsePolicy

NUM_CONTINUED = 1024
"""Tokens that follow the prompt."""
DENSE, MASS, KEYS = "dense", "mass", "keys"


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What attention keeps."""

    kind: str
    size: float = 1.0
    """A share of the attention, or keys a row."""

    def __str__(self) -> str:
        return DENSE if self.kind == DENSE else f"{self.kind} {self.size:g}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """What `str` gives."""
        kind, *size = text.split()
        return cls(kind=kind, size=float(size[0]) if size else 1.0)

    def leaves_out(self, num_tokens: int) -> bool:
        """Whether it can leave anything out of a prompt of that length."""
        return self.kind != KEYS or self.size < num_tokens

    @property
    def policy(self) -> SparsePolicy:
        """Today's defaults with this budget, at any length; not of dense attention."""
        assert self.kind in (MASS, KEYS), f"{self} has no policy"
        if self.kind == MASS:
            return SparsePolicy(mass=self.size, dense_below_tokens=0)
        return SparsePolicy(mass=None, keys_per_row=int(self.size), dense_below_tokens=0)


BASELINE = Budget(kind=DENSE)
BUDGETS = (
    *(Budget(kind=MASS, size=mass) for mass in (0.8, 0.9, 0.95, 0.98)),
    *(Budget(kind=KEYS, size=keys) for keys in (512, 1024, 2048, 4096)),
)
AUDITED = (Budget(kind=MASS, size=0.95), Budget(kind=KEYS, size=1024))
"""Budgets that run with the audit as well."""
LONG = (Budget(kind=MASS, size=0.8), Budget(kind=KEYS, size=1024), Budget(kind=MASS, size=0.95))
"""Budgets beyond the trained context, where a cell takes minutes."""
LONG_AUDITED = AUDITED[:1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One prefill, and what is asked of it."""

    num_tokens: int
    """Prompt and continuation."""
    text: int
    """Number of the text; texts do not overlap."""
    budget: Budget
    is_audited: bool = False
    is_stretched: bool = False
    """YaRN by a factor of 4, as `colm import --rope-scaling yarn --rope-factor 4` has it."""

    def __str__(self) -> str:
        words = [length(self.num_tokens), f"text {self.text}", str(self.budget)]
        return ", ".join(words + ["audited"] * self.is_audited + ["YaRN"] * self.is_stretched)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that are prefilled."""
        return self.num_tokens - NUM_CONTINUED

    @property
    def baseline(self) -> "Cell":
        """The same text, dense."""
        return replace(self, budget=BASELINE, is_audited=False)

    def as_json(self) -> dict[str, Any]:
        """For a record."""
        return asdict(self) | {"budget": str(self.budget)}

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Self:
        """What `as_json` gave."""
        return cls(**{**data, "budget": Budget.parse(data["budget"])})


def cells(lengths: Sequence[int], *, num_texts: int, max_context: int) -> Iterator[Cell]:
    """All cells: text by text, short ones first, each length's baseline first.

    Args:
        lengths: in tokens; those beyond the context are stretched, and the longest that is not is read stretched as
            well, dense.
        num_texts: of each length.
        max_context: that the model was trained for.
    """
    trained = [num_tokens for num_tokens in lengths if num_tokens <= max_context]
    for text in range(num_texts):
        for num_tokens in sorted(lengths):
            is_stretched = num_tokens > max_context
            baseline = Cell(num_tokens=num_tokens, text=text, budget=BASELINE, is_stretched=is_stretched)
            yield baseline
            budgets, audited = (LONG, LONG_AUDITED) if is_stretched else (BUDGETS, AUDITED)
            for is_audited, group in ((False, budgets), (True, audited)):
                for budget in group:
                    if budget.leaves_out(baseline.num_prompt_tokens):
                        yield replace(baseline, budget=budget, is_audited=is_audited)
            if trained and max(lengths) > num_tokens == max(trained):
                yield replace(baseline, is_stretched=True)
