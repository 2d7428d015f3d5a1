"""How busy a prefill node is, and what it has done."""

from dataclasses import dataclass

from colm.nodes import PromptCost


@dataclass(frozen=True, slots=True)
class PrefillLoad:
    """How busy the node is."""

    num_active: int
    num_queued: int
    remaining_s: float
    """Engine time of all jobs that is still to come, as estimated."""
    window_bytes: int
    """Of tiles that are not acknowledged."""
    engine_s: float
    """In which the engine has made steps since the node began."""
    prompt_cost: PromptCost
    """As estimated now."""


@dataclass(slots=True)
class PrefillCounts:
    """What the loop has done since it began."""

    num_tokens: int = 0
    """Computed of prompts whose last tile is there."""
    engine_s: float = 0.0
    """In which the engine made steps."""
    reader_wait_s: float = 0.0
    """In which it stood still, and full windows were all that hindered it."""
    num_leases_expired: int = 0
    """Jobs that were forgotten since no stream came back."""
