"""What sparse attention may leave out, and how that is audited."""

from dataclasses import dataclass

ROW_BLOCK, KEY_BLOCK = 128, 64
"""Rows and keys of a block in every plan; row blocks begin at multiples of their size, as tiles do."""
_TYPICAL_DENSITY = 0.25
"""By mass, before any layer of a prompt has been planned."""
SLASH_KEYS = 192
"""Keys that one diagonal lists for a row block: three key blocks, and they are its 63 neighbours' too."""
MAX_COST = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsePolicy:
    """Which layers and rows are sparse, and how many keys their heads keep.

    A head without a pattern of its own gets verticals and slashes, chosen for each prompt: by `mass`, so that their
    number grows with the prompt and with how widely a head looks, or by `keys_per_row`. One of the two is None.
    """

    mass: float | None = 0.95
    """Share of every head's attention that is kept, as the prompt's last rows have it."""
    keys_per_row: int | None = None
    """Keys that a row of a kv head is given at most, those that every row is given included; dense rows have all."""
    sink_tokens: int = 64
    """First keys that every row attends to; block 0 is always there."""
    local_tokens: int = 128
    """Nearest keys that every row attends to, its own among them."""
    last_rows_dense: int = 128
    """Rows at the prompt's end that attend to everything: the answer begins behind them."""
    dense_below_tokens: int = 32768
    """Shorter prompts are dense: there the estimates cost more than they save."""
    dense_layers: tuple[int, ...] = ()
    """Layers that attend to everything."""
    max_density: float = 0.9
    """Share of the causal pairs above which a layer attends to everything after all: a sparse call
    costs up to 1.1 times its share of the dense one."""

    def __post_init__(self) -> None:
        for name, least in (("sink_tokens", 0), ("local_tokens", 1), ("last_rows_dense", 0), ("dense_below_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if (self.mass is None) == (self.keys_per_row is None):
            raise ValueError(
                f"mass={self.mass} and keys_per_row={self.keys_per_row}: one of them says how much is kept; "
                "set the other to None"
            )
        if self.mass is not None and not 0.0 < self.mass <= 1.0:
            raise ValueError(f"mass={self.mass} must be above 0, where nothing is covered, and at most 1")
        if self.keys_per_row is not None and self.keys_per_row <= self.given_keys:
            raise ValueError(
                f"keys_per_row={self.keys_per_row} covers nothing beside the {self.given_keys} keys that every row is "
                "given; raise it, or lower sink_tokens or local_tokens"
            )
        if not 0.0 < self.max_density <= 1.0:
            raise ValueError(f"max_density={self.max_density} must be above 0 and at most 1")
        if len(set(self.dense_layers)) < len(self.dense_layers) or min(self.dense_layers, default=0) < 0:
            raise ValueError(f"dense_layers={self.dense_layers} must be layers from 0 on, each once")

    @property
    def given_keys(self) -> int:
        """Keys that a row is given whatever its head: sinks and local ones in whole blocks, and its row block."""
        return _whole_blocks(max(1, self.sink_tokens)) + _whole_blocks(self.local_tokens - 1) + ROW_BLOCK

    def expected_density(self, num_tokens: int) -> float:
        """Share of the causal pairs that a layer lists, as far as it can be told before it is planned.

        Columns and diagonals lie anywhere, and a row sees those before it: as many of them as of all keys.
        """
        return _TYPICAL_DENSITY if self.keys_per_row is None else min(1.0, self.keys_per_row / num_tokens)

    def is_dense(self, layer: int, num_tokens: int) -> bool:
        """Whether a layer attends to everything, of a prompt of that length."""
        return layer in self.dense_layers or num_tokens < self.dense_below_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditPolicy:
    """What an audit promises and what it may cost."""

    floor: float = 0.8
    """Mean recall that every head must have; lists with a head below become dense. 0 only reports."""
    confidence: float = 0.95
    """With this probability a bound holds, for each head and for the layer's mean by itself."""
    max_rows: int = 512
    """Rows looked at; fewer where they would cost too much."""
    max_cost: float = 0.02
    """Products of the audit as a share of those of the layer's sparse attention."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.floor < 1.0:
            raise ValueError(f"floor={self.floor} must be at least 0 and below 1")
        if not 0.0 < self.confidence < 1.0:
            raise ValueError(f"confidence={self.confidence} must be above 0 and below 1")
        if self.max_rows < 2:
            raise ValueError(f"max_rows={self.max_rows} must be at least 2: one row has no variance")
        if not 0.0 < self.max_cost < MAX_COST:
            raise ValueError(f"max_cost={self.max_cost} must be above 0 and below {MAX_COST}")

    def num_rows(self, density: float, num_tokens: int, projected: int) -> int:
        """Rows that may be looked at.

        Args:
            density: share of the causal pairs that the layer attends to.
            num_tokens: of the prompt.
            projected: what a row costs beside its products with keys, in such products.
        """
        # In products of one query with one key, for every head; attention makes two, with the key and with its value.
        attention = density * num_tokens * (num_tokens + 1)
        return min(self.max_rows, int(self.max_cost * attention / (num_tokens + projected)))


def _whole_blocks(num_tokens: int) -> int:
    """Tokens of the key blocks that so many tokens touch when they begin with a block."""
    return -(-num_tokens // KEY_BLOCK) * KEY_BLOCK
