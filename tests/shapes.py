"""Random model shapes for property tests, every one valid."""

from hypothesis import strategies as st

from colm.model.config import ChainConfig


@st.composite
def chain_configs(draw: st.DrawFn, min_chains: int = 1, **fixed: object) -> ChainConfig:
    """Any number of chains, with and without KV sharing, of every activation, with and without biases.

    Args:
        draw: from hypothesis.
        min_chains: fewest chains of a config.
        fixed: fields of `ChainConfig` that do not vary.
    """
    num_chains = draw(st.integers(min_chains, 4))
    group = draw(st.integers(1, 3))
    kv_sharing = fixed.get("kv_sharing", draw(st.booleans()))
    shares = draw(st.lists(st.integers(1, 3), min_size=num_chains, max_size=num_chains))
    if kv_sharing:
        num_kv_heads = draw(st.integers(1, 2))
        chains = tuple(num_kv_heads * share for share in shares)
    else:
        num_kv_heads = sum(shares)
        chains = tuple(group * share for share in shares)
    num_heads = sum(chains)
    values = {
        "dim": num_heads * 2 * draw(st.integers(1, 6)),
        "hidden_dim": num_heads * draw(st.integers(1, 9)),
        "num_layers": draw(st.integers(1, 2)),
        "vocab_size": draw(st.integers(2, 40)),
        "tie_embeddings": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "activation": draw(st.sampled_from(("swiglu", "gelu"))),
        "explicit_head_dim": draw(st.sampled_from((None, 2, 6))),
    }
    return ChainConfig(
        chains=chains,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        **values | {"kv_sharing": kv_sharing} | fixed,
    )
