"""The chain rule: no result at a scale depends on later chains."""

import torch
from colm_kernels import tolerance
from colm_kernels.rotary import rotate_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from colm.checkpoint import assign
from colm.model import ChainTransformer, parameter_shapes
from colm.model.attention import ChainAttention
from colm.model.config import ChainConfig
from colm.model.ffn import ChainFFN
from colm.model.linear import ChainLinear
from colm.model.norm import ChainRMSNorm
from colm.model.rope import Rope
from colm.model.transformer import slice_config
from colm.training.stages import chain_of
from tests.shapes import chain_configs
from tests.tiny import random_tensors

DTYPES = st.sampled_from((torch.float32, torch.bfloat16))
NUM_TOKENS = 7

few = settings(max_examples=40)


def model_of(config: ChainConfig, tensors: dict[str, Tensor], dtype: torch.dtype) -> ChainTransformer:
    with torch.device("meta"):
        model = ChainTransformer(config)
    assign(model, tensors, dtype)
    return model


def tokens_of(config: ChainConfig) -> Tensor:
    return torch.randint(config.vocab_size, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(3))


def poisoned(tensors: dict[str, Tensor], num_chains: int) -> dict[str, Tensor]:
    """The model with NaN in every weight of later chains: a result that depends on one of them is NaN."""
    return {
        name: torch.full_like(tensor, torch.nan) if chain_of(name) > num_chains else tensor
        for name, tensor in tensors.items()
    }


@few
@given(config=chain_configs(min_chains=2), dtype=DTYPES, data=st.data())
def test_nothing_of_a_scale_depends_on_later_chains(config: ChainConfig, dtype: torch.dtype, data: st.DataObject):
    """Later chains' embedding columns are their input, so the test changes both inputs and weights."""
    num_chains = data.draw(st.integers(1, config.num_chains - 1))
    tensors, tokens_BT = random_tensors(config), tokens_of(config)
    with torch.inference_mode():
        before = model_of(config, tensors, dtype)
        after = model_of(config, poisoned(tensors, num_chains), dtype)
        assert torch.equal(before(tokens_BT, num_chains), after(tokens_BT, num_chains))
        whole = zip(before.hidden_states(tokens_BT), after.hidden_states(tokens_BT), strict=True)
        for chain, (clean, changed) in enumerate(whole):
            assert torch.equal(clean, changed) is (chain < num_chains)


@few
@given(config=chain_configs(), dtype=DTYPES, data=st.data())
def test_a_slice_alone_equals_the_scale_inside_the_whole(config: ChainConfig, dtype: torch.dtype, data: st.DataObject):
    num_chains = data.draw(st.integers(1, config.num_chains))
    tensors, tokens_BT = random_tensors(config), tokens_of(config)
    sliced = slice_config(config, num_chains)
    with torch.inference_mode():
        whole = model_of(config, tensors, dtype)
        alone = model_of(sliced, {name: tensors[name] for name in parameter_shapes(sliced)}, dtype)
        assert torch.equal(alone(tokens_BT), whole(tokens_BT, num_chains))
        inside = whole.hidden_states(tokens_BT)[:num_chains]
        for ours, theirs in zip(alone.hidden_states(tokens_BT), inside, strict=True):
            assert torch.equal(ours, theirs)


@few
@given(config=chain_configs(min_chains=2, kv_sharing=True), dtype=DTYPES)
def test_kv_sharing_gives_the_same_cache_at_every_scale(config: ChainConfig, dtype: torch.dtype):
    tokens_BT = tokens_of(config)
    with torch.inference_mode():
        model = model_of(config, random_tensors(config), dtype)
        caches = [cache_at(model, tokens_BT, scale) for scale in range(1, config.num_chains + 1)]
    for other in caches[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(caches[0], other, strict=True))


def cache_at(model: ChainTransformer, tokens_BT: Tensor, num_chains: int) -> list[Tensor]:
    """Every layer's rotated keys and values, from the hidden states of a pass at one scale."""
    cos, sin = (table.repeat(2, 1) for table in Rope(model.config).tables(torch.arange(NUM_TOKENS)))
    cos_TD, sin_TD = cos[:NUM_TOKENS], sin[:NUM_TOKENS]
    xs, cache = model.embedding.embed_by_chain(tokens_BT.flatten(), num_chains), []
    for layer in model.blocks:
        k_RKD, v_RKD = layer.attention.keys_values(layer.attention_norm.by_chain(xs)[0])
        cache += [rotate_reference(k_RKD, cos, sin), v_RKD]
        xs = layer.by_chain(xs, cos_TD, sin_TD, num_sequences=2)
    return cache


@few
@given(config=chain_configs(min_chains=2), data=st.data())
def test_a_composition_of_layers_keeps_the_rule(config: ChainConfig, data: st.DataObject):
    """Any stack of any layers: norms, linears, feed-forwards and attentions, in any order."""
    num_chains = data.draw(st.integers(1, config.num_chains - 1))
    stack = data.draw(st.lists(st.sampled_from(("norm", "linear", "ffn", "attention")), min_size=1, max_size=5))
    layers = [filled(layer_of(kind, config), seed) for seed, kind in enumerate(stack)]
    xs = [torch.randn(NUM_TOKENS, dim, generator=torch.Generator().manual_seed(dim)) for dim in config.chain_dims]
    cos, sin = Rope(config).tables(torch.arange(NUM_TOKENS))

    def run(xs: list[Tensor]) -> list[Tensor]:
        for layer in layers:
            xs = layer.by_chain(xs, cos, sin, 1) if isinstance(layer, ChainAttention) else layer.by_chain(xs)
        return xs

    with torch.inference_mode():
        changed = run([x if chain < num_chains else x * torch.nan for chain, x in enumerate(xs)])
        for clean, other in zip(run(xs)[:num_chains], changed, strict=False):
            assert torch.equal(clean, other)
        for clean, alone in zip(run(xs)[:num_chains], run(xs[:num_chains]), strict=True):
            assert torch.equal(clean, alone)


def layer_of(kind: str, config: ChainConfig) -> torch.nn.Module:
    if kind == "norm":
        return ChainRMSNorm(config.chain_dims, config.norm_eps)
    if kind == "linear":
        return ChainLinear(config.chain_dims, config.chain_dims, bias=config.bias)
    return ChainFFN(config) if kind == "ffn" else ChainAttention(config)


def filled(layer: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return layer


@few
@given(config=chain_configs(min_chains=2), dtype=DTYPES, data=st.data())
def test_the_nodes_way_keeps_the_rule(config: ChainConfig, dtype: torch.dtype, data: st.DataObject):
    """All chains side by side in one tensor: later columns and weights full of NaN change no earlier column."""
    num_chains = data.draw(st.integers(1, config.num_chains - 1))
    dim = sum(config.chain_dims[:num_chains])
    x_RD = torch.randn(NUM_TOKENS, config.dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    changed_RD = x_RD.clone()
    changed_RD[:, dim:] = torch.nan
    rows = (NUM_TOKENS,) * config.num_chains
    linear, ffn = (filled(layer_of(kind, config), 2).to(dtype) for kind in ("linear", "ffn"))
    norm = filled(layer_of("norm", config), 3).to(dtype)
    with torch.inference_mode():
        for run in (lambda x: linear(x, rows), lambda x: ffn(x, rows), lambda x: norm(x, config.num_chains)):
            clean_RD = run(x_RD)
            assert torch.equal(run(changed_RD)[:, :dim], clean_RD[:, :dim])
        for layer in (linear, ffn):
            before_RD = layer(x_RD, rows)[:, :dim]
            for name, parameter in layer.named_parameters():
                if chain_of(f".{name}") > num_chains:
                    parameter.fill_(torch.nan)
            assert torch.equal(layer(x_RD, rows)[:, :dim], before_RD)


@few
@given(config=chain_configs(), dtype=DTYPES)
def test_one_chain_is_the_plain_layer(config: ChainConfig, dtype: torch.dtype):
    """Norm and feed-forward are bit-equal, given products that differ only in the order of their sums."""
    llama = slice_config(config, 1)
    x_RD = torch.randn(NUM_TOKENS, llama.dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    norm = filled(layer_of("norm", llama), 1).to(dtype)
    linear, ffn = (filled(layer_of(kind, llama), 2).to(dtype) for kind in ("linear", "ffn"))
    with torch.inference_mode():
        scale = torch.rsqrt(x_RD.float().square().mean(dim=-1, keepdim=True) + llama.norm_eps)
        assert torch.equal(norm.by_chain([x_RD])[0], (x_RD.float() * scale).to(dtype) * norm.chain1)
        exact = tolerance.linear(x_RD, linear.weights(1), linear.biases(1), (NUM_TOKENS,))
        exact.check(linear.by_chain([x_RD])[0])
        assert torch.equal(ffn.by_chain([x_RD])[0], plain_ffn(ffn, x_RD))


def plain_ffn(ffn: ChainFFN, x_RD: Tensor) -> Tensor:
    up = ffn.up.by_chain([x_RD])[0]
    return ffn.down.by_chain([F.silu(ffn.gate.by_chain([x_RD])[0]) * up if ffn.is_gated else F.gelu(up)])[0]


@few
@given(config=chain_configs(), dtype=DTYPES)
def test_attention_of_one_chain_is_plain_attention_over_its_projections(config: ChainConfig, dtype: torch.dtype):
    llama = slice_config(config, 1)
    attention = filled(layer_of("attention", llama), 4).to(dtype)
    x_TD = torch.randn(NUM_TOKENS, llama.dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    cos, sin = Rope(llama).tables(torch.arange(NUM_TOKENS))

    def heads(linear: ChainLinear) -> Tensor:
        return linear.by_chain([x_TD])[0].view(NUM_TOKENS, -1, llama.head_dim)

    with torch.inference_mode():
        q, k, v = (
            rotate_reference(heads(attention.wq), cos, sin),
            rotate_reference(heads(attention.wk), cos, sin),
            heads(attention.wv),
        )
        q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        (expected,) = attention.wo.by_chain([out.transpose(1, 2).reshape(NUM_TOKENS, -1)])
        assert torch.equal(attention.by_chain([x_TD], cos, sin, 1)[0], expected)
