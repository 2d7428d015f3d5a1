"""The models of the paper (arXiv 2505.11820v2), by name.

    expansion-llama3.2-1b            Table 9, under the paper's own names, in lower case; no KV sharing
    colm-16-16, colm-8-8-8-8         Table 9, the baseline's dimensions; the numbers are the chains
    colm-16-16-same-params           Table 9, widened to about the baseline's parameters
    llama                            Table 9, the baseline
    ...-air                          any of Table 9's chained models with KV sharing

    llama-3.2-1b, llama-3.1-8b       Tables 10 to 13, the baselines
    llama-3.2-1b-16-16-air           Tables 10 to 13, the baseline's configuration in chains; always with KV sharing
    llama-3.2-1b-8-24-air-same-params   Tables 10 to 13, deepened to about the baseline's parameters

Table 9's models have LLaMA 2's vocabulary and a context of 4096, as the paper trained them; the expansions keep what
their source has. The others have the vocabulary, rope and norm of the LLaMA they are named after, and a context of
1M as the tables run it. The head is never tied: it is the paper's count, and an expanded head cannot be.
"""

from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches

from colm.model.config import ChainConfig, RopeScaling

_LLAMA3_ROPE = RopeScaling(kind="llama3", factor=32.0, original_max_context=8192)

_TABLE_9 = ChainConfig(
    dim=2048,
    hidden_dim=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    chains=(32,),
    vocab_size=32_000,
    kv_sharing=False,
)
_LLAMA_3_2_1B = replace(
    _TABLE_9, vocab_size=128_256, rope_theta=500_000.0, rope_scaling=_LLAMA3_ROPE, kv_sharing=True, max_context=1 << 20
)
_LLAMA_3_1_8B = replace(
    _LLAMA_3_2_1B,
    dim=4096,
    hidden_dim=14_336,
    num_layers=32,
    rope_scaling=replace(_LLAMA3_ROPE, factor=8.0),
)

_CHAINS = ((16, 16), (8, 24), (8, 8, 16), (8, 8, 8, 8))
_SAME_CONFIGURATION = ((16, 16), (8, 8, 8, 8))
_WIDENED_DIM = {(16, 16): 2560, (8, 8, 8, 8): 3072}
_DEEPENED_LAYERS = {
    "llama-3.2-1b": {(16, 16): 22, (8, 8, 8, 8): 26, (8, 8, 16): 24, (8, 24): 21},
    "llama-3.1-8b": {(16, 16): 43, (8, 8, 8, 8): 52, (8, 8, 16): 48, (8, 24): 40},
}
_BASELINES = {"llama-3.2-1b": _LLAMA_3_2_1B, "llama-3.1-8b": _LLAMA_3_1_8B}


def _table_9() -> Iterator[tuple[str, ChainConfig]]:
    yield "llama", _TABLE_9
    # Expansion keeps the width per head, so 8 heads beside 32 make every width 5/4 of the source's. With KV sharing
    # the source's own kv heads are all there are.
    llama = replace(_LLAMA_3_2_1B, max_context=131_072)
    for name, source in {
        "expansion-llama3.2-1b": llama,
        "expansion-tinyllama": replace(_TABLE_9, hidden_dim=5632, num_layers=22, num_kv_heads=4, max_context=2048),
    }.items():
        air = replace(
            source, dim=2560, hidden_dim=source.hidden_dim * 5 // 4, num_heads=40, chains=(32, 8), kv_sharing=True
        )
        yield name, replace(air, kv_sharing=False, num_kv_heads=source.num_kv_heads * 5 // 4)
        yield f"{name}-air", air
    for chains in _CHAINS:
        name, config = f"colm{_suffix(chains)}", replace(_TABLE_9, chains=chains)
        yield name, config
        yield f"{name}-air", replace(config, kv_sharing=True)
        if chains in _WIDENED_DIM:
            wide = replace(config, dim=_WIDENED_DIM[chains])
            yield f"{name}-same-params", wide
            yield f"{name}-air-same-params", replace(wide, kv_sharing=True)


def _tables_10_to_13() -> Iterator[tuple[str, ChainConfig]]:
    for name, baseline in _BASELINES.items():
        yield name, baseline
        for chains in _CHAINS:
            config, chained = replace(baseline, chains=chains), f"{name}{_suffix(chains)}-air"
            if chains in _SAME_CONFIGURATION:
                yield chained, config
            yield f"{chained}-same-params", replace(config, num_layers=_DEEPENED_LAYERS[name][chains])


def _suffix(chains: tuple[int, ...]) -> str:
    return "".join(f"-{chain}" for chain in chains)


PRESETS: dict[str, ChainConfig] = dict(_table_9()) | dict(_tables_10_to_13())
"""Every model of the paper, by name."""


def preset(name: str) -> ChainConfig:
    """A model of the paper by its name.

    Raises:
        ValueError: unknown name; the message lists the nearest.
    """
    if name not in PRESETS:
        nearest = get_close_matches(name, PRESETS, n=3, cutoff=0.0)
        raise ValueError(f"preset={name!r} is unknown; nearest are {', '.join(nearest)}; PRESETS has them all")
    return PRESETS[name]
