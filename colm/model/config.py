"""The shape of a CoLM model: dimensions, chains, and what follows from them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, cast, get_args

Activation = Literal["swiglu", "gelu"]


RopeKind = Literal["linear", "llama3", "yarn"]
_LENGTH_DEPENDENT = frozenset({"dynamic", "longrope"})
# What no model reaches. Beyond it sizes overflow, or are lists that take minutes to build.
_LARGEST = {
    "dim": 1 << 20,
    "hidden_dim": 1 << 22,
    "num_layers": 1 << 12,
    "num_heads": 1 << 14,
    "num_kv_heads": 1 << 14,
    "vocab_size": 1 << 24,
    "max_context": (1 << 31) - 1,
    "explicit_head_dim": 1 << 14,
}
_LARGEST_NUMBER = 1e15


def parse_rope_kind(kind: str) -> RopeKind:
    """The kind of rope scaling of a user's or a file's word.

    Raises:
        ValueError: an unknown kind, or one whose keys could not be kept.
    """
    if not isinstance(kind, str):
        raise ValueError(f"{_shown(kind)} is no word; use {', '.join(map(repr, get_args(RopeKind)))}")
    if kind in _LENGTH_DEPENDENT:
        raise ValueError(
            f"{kind!r} cannot be served: its frequencies follow the prompt's length, so the keys kept of a text are "
            "not those of the same text in a longer prompt; use 'yarn'"
        )
    if kind not in get_args(RopeKind):
        raise ValueError(f"{kind!r} is unknown; use {', '.join(map(repr, get_args(RopeKind)))}")
    return cast(RopeKind, kind)


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context of pre-training."""

    kind: RopeKind
    """`linear` divides every frequency by `factor`; `llama3` and `yarn` only the low ones, with a ramp between two
    bounds: in frequency for `llama3`, in the number of the plane for `yarn` (arXiv 2309.00071)."""
    factor: float
    low_freq_factor: float = 1.0
    """llama3: wavelengths above `original_max_context / low_freq_factor` are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below `original_max_context / high_freq_factor` are left alone."""
    original_max_context: int = 8192
    """llama3 and yarn: the context, in tokens, of pre-training."""
    beta_fast: float = 32.0
    """yarn: planes that turn more often than this in `original_max_context` tokens are left alone."""
    beta_slow: float = 1.0
    """yarn: planes that turn less often than this are divided by `factor`."""
    truncate: bool = True
    """yarn: the ramp begins and ends at whole planes, the next ones outwards."""
    attention_factor: float | None = None
    """yarn: multiplies rotated queries and keys; None for the paper's, 1 + ln(factor) / 10."""

    def __post_init__(self) -> None:
        _check_number("rope_scaling.factor", self.factor, 1.0, _LARGEST_NUMBER)
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
            if (value := getattr(self, name)) is not None or name != "attention_factor":
                _check_number(f"rope_scaling.{name}", value, -_LARGEST_NUMBER, _LARGEST_NUMBER)
        _check_whole("rope_scaling.original_max_context", self.original_max_context, _LARGEST["max_context"])
        _check_flag("rope_scaling.truncate", self.truncate)
        try:
            parse_rope_kind(self.kind)
        except ValueError as err:
            raise ValueError(f"rope_scaling.kind={err}") from err
        if self.kind == "llama3" and not 0.0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling.low_freq_factor={self.low_freq_factor} must be above 0 and below "
                f"high_freq_factor={self.high_freq_factor}"
            )
        if self.kind == "yarn" and not 0.0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"rope_scaling.beta_slow={self.beta_slow} must be above 0 and below beta_fast={self.beta_fast}"
            )
        if self.attention_factor is not None and not self.attention_factor > 0.0:
            raise ValueError(f"rope_scaling.attention_factor={self.attention_factor} must be above 0, and finite")

    def __str__(self) -> str:
        text = f"{self.kind}, factor {self.factor:g}"
        if self.kind != "linear":
            text += f" from {self.original_max_context} tokens"
        if self.kind == "llama3":
            text += f", frequency factors {self.low_freq_factor:g} and {self.high_freq_factor:g}"
        if self.kind == "yarn":
            text += f", betas {self.beta_fast:g} and {self.beta_slow:g}, attention factor {self.rotation_factor:.5g}"
        return text

    @property
    def rotation_factor(self) -> float:
        """What cosines and sines are multiplied by; 1.0 for all kinds but yarn."""
        if self.kind != "yarn":
            return 1.0
        return yarn_attention_factor(self.factor) if self.attention_factor is None else self.attention_factor


def yarn_attention_factor(factor: float, weight: float = 1.0) -> float:
    """YaRN's factor on rotated queries and keys, 1 + weight * ln(factor) / 10."""
    return 0.1 * weight * math.log(factor) + 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainConfig:
    """Dimensions of one model. `len(chains) == 1` is an ordinary LLaMA.

    Every split dimension is divided among the chains in the ratio `chains[i] / sum(chains)`; the first i
    chains together are "scale i" and form a complete smaller model.
    """

    dim: int
    """Width of the residual stream, all chains together."""
    hidden_dim: int
    """Width of the feed-forward layer, all chains together."""
    num_layers: int
    num_heads: int
    """Query heads, all chains together; equals sum(chains)."""
    num_kv_heads: int
    chains: tuple[int, ...]
    """Query heads of each chain."""
    vocab_size: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    """The head is the embedding table itself."""
    kv_sharing: bool = True
    """CoLM-Air: all keys and values come from chain 1 and are read by the queries of every chain. Without it (CoLM)
    each chain has its own share of the kv heads."""
    bias: bool = False
    """All linears of attention and feed-forward have a bias."""
    activation: Activation = "swiglu"
    """Activation of the feed-forward: `swiglu` is down(silu(gate(x)) * up(x)), `gelu` is down(gelu(up(x)))."""
    max_context: int = 4096
    """Longest sequence, prompt and answer together, in tokens."""
    explicit_head_dim: int | None = None
    """Head dim where it is not `dim / num_heads`."""

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            if name != "explicit_head_dim" or self.explicit_head_dim is not None:
                _check_whole(name, getattr(self, name), largest)
        for name in ("tie_embeddings", "kv_sharing", "bias"):
            _check_flag(name, getattr(self, name))
        _check_number("rope_theta", self.rope_theta, 1.0, _LARGEST_NUMBER)
        _check_number("norm_eps", self.norm_eps, 0.0, 1.0)
        if not isinstance(self.activation, str) or self.activation not in get_args(Activation):
            raise ValueError(f"activation={self.activation!r} is unknown; use {' or '.join(get_args(Activation))}")
        _check_chains(self)
        _check_widths(self)
        _check_kv_heads(self)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.explicit_head_dim or self.dim // self.num_heads

    @property
    def num_chains(self) -> int:
        """Chains of the whole model."""
        return len(self.chains)

    @property
    def chain_dims(self) -> tuple[int, ...]:
        """Share of `dim` that belongs to each chain."""
        return self.split(self.dim)

    @property
    def chain_hidden_dims(self) -> tuple[int, ...]:
        """Share of `hidden_dim` that belongs to each chain."""
        return self.split(self.hidden_dim)

    @property
    def chain_query_dims(self) -> tuple[int, ...]:
        """Width of each chain's queries, all its heads together."""
        return tuple(chain * self.head_dim for chain in self.chains)

    @property
    def chain_kv_heads(self) -> tuple[int, ...]:
        """KV heads by the chain that computes them: all by chain 1 with KV sharing, else a share by each chain."""
        return (self.num_kv_heads,) if self.kv_sharing else self.split(self.num_kv_heads)

    @property
    def kv_dim(self) -> int:
        """Width of one token's keys in one layer, all kv heads together."""
        return self.num_kv_heads * self.head_dim

    def split(self, width: int) -> tuple[int, ...]:
        """Divide a width among the chains."""
        return tuple(width * chain // sum(self.chains) for chain in self.chains)

    def resolve_num_chains(self, num_chains: int | None) -> int:
        """Active chains; None means all.

        Raises:
            ValueError: outside 1..n.
        """
        if num_chains is None:
            return self.num_chains
        if not 1 <= num_chains <= self.num_chains:
            raise ValueError(f"num_chains={num_chains} must be between 1 and {self.num_chains}")
        return num_chains

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form; `from_dict` reads it back."""
        return asdict(self) | {"chains": list(self.chains)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: an unknown or missing field, or values that do not fit together.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"unknown model fields {unknown}; known are {sorted(known)}")
        values = dict(data)
        scaling = values.get("rope_scaling")
        if scaling is not None and not isinstance(scaling, Mapping):
            raise ValueError(f"rope_scaling={_shown(scaling)} must be an object, or null")
        try:
            if scaling is not None:
                values["rope_scaling"] = RopeScaling(**scaling)
            if isinstance(values.get("chains"), list):
                values["chains"] = tuple(values["chains"])
            return cls(**values)
        except TypeError as err:
            raise ValueError(f"model section: {err}") from err


def _shown(value: object) -> str:
    # Python refuses to print an integer of thousands of digits.
    text = "a number of that many bits" if isinstance(value, int) and value.bit_length() > 256 else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_whole(value: object, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest


def _check_whole(name: str, value: object, largest: int) -> None:
    if not _is_whole(value, largest):
        raise ValueError(f"{name}={_shown(value)} must be a whole number, at least 1 and at most {largest}")


def _check_number(name: str, value: object, lowest: float, highest: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
        raise ValueError(f"{name}={_shown(value)} must be at least {lowest}, and finite: at most {highest:g}")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={_shown(value)} must be true or false")


def _check_chains(config: ChainConfig) -> None:
    chains, num_heads = config.chains, config.num_heads
    are_counts = isinstance(chains, tuple) and 0 < len(chains) <= num_heads
    if not are_counts or not all(_is_whole(chain, _LARGEST["num_heads"]) for chain in chains):
        raise ValueError(f"chains={_shown(chains)} must be a non-empty list of positive head counts")
    total = sum(chains)
    if total != num_heads:
        rest = num_heads - sum(chains[:-1])
        nearest = f"chains={(*chains[:-1], rest)} or num_heads={total}" if rest > 0 else f"num_heads={total}"
        raise ValueError(
            f"chains={chains} sum to {total}, but num_heads={num_heads}; they must be equal, e.g. {nearest}"
        )


def _check_widths(config: ChainConfig) -> None:
    chains, total = config.chains, sum(config.chains)
    for name in ("dim", "hidden_dim"):
        width = getattr(config, name)
        if any(width * chain % total for chain in chains):
            raise ValueError(
                f"{name}={width} does not split in the ratio {chains}; "
                f"use a multiple of {total}, e.g. {_nearest_multiple(width, total)}"
            )
    if config.explicit_head_dim is None and config.dim % total:
        raise ValueError(
            f"dim={config.dim} is not a multiple of num_heads={total}; give explicit_head_dim, "
            f"or use dim={_nearest_multiple(config.dim, total)}"
        )
    if config.head_dim % 2:
        raise ValueError(
            f"head_dim={config.head_dim} must be even for rotary embeddings, e.g. {config.head_dim + 1}"
            + ("" if config.explicit_head_dim else f" with dim={(config.head_dim + 1) * total}")
        )


def _check_kv_heads(config: ChainConfig) -> None:
    chains, num_kv_heads, total = config.chains, config.num_kv_heads, sum(config.chains)
    unit = math.gcd(*chains)
    if config.kv_sharing:
        rule = f"with kv_sharing each chain must be a multiple of num_kv_heads={num_kv_heads}"
        # A kv head serves equally many queries of each chain.
        valid = [heads for heads in range(1, unit + 1) if unit % heads == 0]
        misfits = [chain for chain in chains if chain % num_kv_heads]
    else:
        rule = f"without kv_sharing num_kv_heads={num_kv_heads} must split in that ratio and divide num_heads={total}"
        # The smallest split gives each chain one kv head per unit of its share.
        parts = total // unit
        valid = [heads for heads in range(parts, total + 1, parts) if total % heads == 0]
        misfits = [] if num_kv_heads in valid else [num_kv_heads]
    if misfits:
        nearest = min(valid, key=lambda heads: abs(heads - num_kv_heads))
        raise ValueError(f"chains={chains}: {rule}, but {misfits[0]} is not; the nearest is num_kv_heads={nearest}")


def _nearest_multiple(value: int, unit: int) -> int:
    return max(1, round(value / unit)) * unit
