"""Rope scaling given at import: a model runs beyond the context that it was trained for."""

from dataclasses import dataclass, replace
from pathlib import Path

from colm.errors import UnsupportedModel
from colm.model.config import ChainConfig, RopeKind, RopeScaling


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """How far, and in which way, positions are stretched.

    Raises:
        ValueError: a kind that needs training, or is no kind; a factor below 1.
    """

    kind: RopeKind
    """`linear` or `yarn`; YaRN needs no training to work, linear scaling loses accuracy without it."""
    factor: float
    """Of the trained context."""
    max_context: int | None = None
    """The longest sequence, in tokens; None for as long as the factor allows."""

    def __post_init__(self) -> None:
        RopeScaling(kind=self.kind, factor=self.factor)
        if self.kind == "llama3":
            raise ValueError("rope_scaling.kind='llama3' is for models trained with it; use 'linear' or 'yarn'")

    def of(self, source: Path, config: ChainConfig) -> ChainConfig:
        """The config of a source, stretched.

        Raises:
            UnsupportedModel: the source is stretched already, or `max_context` is beyond what the factor allows.
        """
        if config.rope_scaling is not None:
            raise UnsupportedModel(
                f"{source}: the model has a rope scaling of its own ({config.rope_scaling}), which another would "
                "replace; import it without one"
            )
        longest = int(self.factor * config.max_context)
        max_context = longest if self.max_context is None else self.max_context
        if not 1 <= max_context <= longest:
            raise UnsupportedModel(
                f"{source}: max_context={max_context} must be between 1 and {longest}, which is factor={self.factor:g} "
                f"times the model's {config.max_context} tokens"
            )
        scaling = RopeScaling(kind=self.kind, factor=self.factor)
        if self.kind == "yarn":
            scaling = replace(scaling, original_max_context=config.max_context)
        return replace(config, rope_scaling=scaling, max_context=max_context)
