"""The options of a prefill node."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import ByteSize, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from colm import defaults
from colm.settings import PrefillLineSettings
from prefill_node.sparse.policy import AuditPolicy, SparsePolicy


class PrefillSettings(PrefillLineSettings):
    """How a prefill node works, wherever it runs."""

    tile_tokens: PositiveInt = defaults.TILE_TOKENS
    """Tokens that a prefill node computes and sends at a time."""
    attention_backend: Literal["auto", "flash_attn", "triton"] = "auto"
    """Implementation of dense attention on a GPU; auto: flash-attn if it can be imported, else Triton."""
    sparse_mass: float | None = None
    """Share of every head's attention that sparse attention keeps, for requests that ask for it; 0.95 by default."""
    sparse_keys_per_row: PositiveInt | None = None
    """Keys that sparse attention gives to a row at most, instead of a share of the attention."""
    sparse_dense_below_tokens: NonNegativeInt = SparsePolicy().dense_below_tokens
    """Shorter prompts are dense whatever their requests ask for."""
    sparse_patterns: Path | None = None
    """File of `colm search-patterns`, at the same place on every node; each head has its pattern instead of a share."""
    audit_floor: float = AuditPolicy().floor
    """Mean recall that sampled rows must show for every head; heads below attend to everything. 0 only reports."""
    audit_confidence: float = AuditPolicy().confidence
    """Probability with which a head's recall is no less than its bound, which is held against the floor."""
    audit_max_rows: int = AuditPolicy().max_rows
    """Rows that are sampled of a layer at most."""
    audit_max_cost: float = AuditPolicy().max_cost
    """Products of an audit as a share of those of the layer's sparse attention; below 0.05."""
    max_queued_s: PositiveFloat = defaults.MAX_QUEUED_S
    """Seconds of work, as estimated, that may lie before a new prompt on a prefill node; with more it is refused."""
    stall_s: PositiveFloat = defaults.STALL_S
    """Seconds for which a reader may store nothing while others wait for its prompt's memory; else ten times that."""
    shared_memory: Literal["auto", "off"] = "auto"
    """auto: keys and values go through shared memory to decode nodes of the same host and user; off: never."""
    memory_bytes: Annotated[ByteSize, Field(gt=0)] | None = None
    """Memory for the prompts that a prefill node has begun, e.g. "8GiB"; default: half of what is free then."""

    prefix_cache_bytes: Annotated[ByteSize, Field(ge=0)] | None = None
    """Memory for keys and values of earlier prompts; default: 1GiB, or an eighth of what is free if less; 0: none."""

    @property
    def sparse_policy(self) -> SparsePolicy:
        """What sparse attention may leave out.

        Raises:
            ValueError: names the field without its prefix.
        """
        default = SparsePolicy().mass if self.sparse_keys_per_row is None else None
        return SparsePolicy(
            mass=default if self.sparse_mass is None else self.sparse_mass,
            keys_per_row=self.sparse_keys_per_row,
            dense_below_tokens=self.sparse_dense_below_tokens,
        )

    @property
    def audit_policy(self) -> AuditPolicy:
        """What sparse attention must recall.

        Raises:
            ValueError: names the field without its prefix.
        """
        return AuditPolicy(
            floor=self.audit_floor,
            confidence=self.audit_confidence,
            max_rows=self.audit_max_rows,
            max_cost=self.audit_max_cost,
        )

    @model_validator(mode="after")
    def _check_sparse(self) -> Self:
        if self.sparse_mass is not None and self.sparse_keys_per_row is not None:
            raise ValueError(
                f"sparse_mass={self.sparse_mass} and sparse_keys_per_row={self.sparse_keys_per_row}: "
                "one of them says how much is kept; leave the other out"
            )
        try:
            self.sparse_policy  # noqa: B018 - it checks itself
        except ValueError as err:
            raise ValueError(f"sparse_{err}") from err
        try:
            self.audit_policy  # noqa: B018 - likewise
        except ValueError as err:
            raise ValueError(f"audit_{err}") from err
        return self
