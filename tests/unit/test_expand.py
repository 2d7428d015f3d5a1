"""Chain expansion: existing chains stay bit for bit, fresh ones start as documented."""

import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colm.checkpoint import Checkpoint
from colm.convert import expand
from colm.convert.expand import _expanded_config
from colm.errors import UnsupportedModel
from colm.model.presets import preset
from colm.model.transformer import slice_config
from tests.shapes import chain_configs
from tests.tiny import in_memory, tiny_checkpoint, tiny_config


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def source(tmp_path, request) -> Checkpoint:
    config = tiny_config(chains=(6,), tie_embeddings=request.param, rope_theta=5000.0)
    return tiny_checkpoint(tmp_path / "source", config, tokenizer=True)


def logits(checkpoint: Checkpoint, num_chains: int | None = None) -> torch.Tensor:
    tokens_BT = torch.randint(320, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return in_memory(checkpoint, num_chains)(tokens_BT)


def test_expanded_logits_equal_the_source_at_every_scale(source, tmp_path):
    larger = expand(source.path, tmp_path / "larger", (6, 2, 4))
    for num_chains in (1, 2, 3):
        assert torch.equal(logits(larger, num_chains), logits(source))


def test_expansion_of_an_expansion_keeps_every_chain(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", tiny_config(chains=(4, 2)))
    larger = expand(source.path, tmp_path / "larger", (4, 2, 2))
    assert torch.equal(logits(larger, 1), logits(source, 1))
    assert torch.equal(logits(larger, 3), logits(source, 2))


@settings(max_examples=25)
@given(source=chain_configs(), data=st.data())
def test_any_model_expanded_by_any_chains_answers_as_before_at_every_scale(source, data):
    """Expand twice in a row, with and without KV sharing, with every other property of a model."""
    kv_sharing = data.draw(st.booleans()) if source.num_chains == 1 else None
    with TemporaryDirectory() as directory:
        checkpoint = tiny_checkpoint(Path(directory) / "0", source)
        shares = kv_sharing is True or (kv_sharing is None and (source.kv_sharing or source.num_chains == 1))
        # The smallest chain that fits: with KV sharing one that every kv head serves evenly, without it one kv head.
        unit = source.num_kv_heads if shares else source.num_heads // source.num_kv_heads
        for step, added in enumerate(data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=2)), start=1):
            before = checkpoint.config
            chains = (*before.chains, added * unit)
            if any(width * chains[-1] % before.num_heads for width in (before.dim, before.hidden_dim)):
                chains = (*before.chains, unit * before.num_heads)
            larger = expand(checkpoint.path, Path(directory) / str(step), chains, kv_sharing=kv_sharing)
            assert larger.config.kv_sharing is shares
            tokens_BT = torch.randint(before.vocab_size, (2, 5), generator=torch.Generator().manual_seed(1))
            with torch.inference_mode():
                old, new = in_memory(checkpoint), in_memory(larger)
                for scale in range(1, before.num_chains + 1):
                    assert torch.equal(new(tokens_BT, scale), old(tokens_BT, scale))
                assert torch.equal(new(tokens_BT), old(tokens_BT))
            checkpoint, kv_sharing = larger, None


def test_kv_heads_grow_with_the_chains_only_without_kv_sharing(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", tiny_config(chains=(8,), bias=True))
    air = expand(source.path, tmp_path / "air", (8, 4)).config
    colm = expand(source.path, tmp_path / "colm", (8, 4), kv_sharing=False).config
    assert (air.kv_sharing, air.num_kv_heads, air.bias) == (True, 2, True)
    assert (colm.kv_sharing, colm.num_kv_heads, colm.chain_kv_heads) == (False, 3, (2, 1))


def test_several_chains_keep_their_way_with_keys_and_values(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", tiny_config(chains=(4, 4), kv_sharing=False, num_kv_heads=4))
    assert expand(source.path, tmp_path / "larger", (4, 4, 2)).config.kv_sharing is False
    with pytest.raises(UnsupportedModel, match="kv_sharing=True, but the source's 2 chains have kv_sharing=False"):
        expand(source.path, tmp_path / "other", (4, 4, 2), kv_sharing=True)


def test_kv_heads_that_would_not_be_whole_are_refused(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", tiny_config(chains=(8,)))
    with pytest.raises(UnsupportedModel, match=r"num_kv_heads=2 over 8 heads .* sum is a multiple of 4"):
        expand(source.path, tmp_path / "larger", (8, 2), kv_sharing=False)


@pytest.mark.parametrize("name", ["expansion-llama3.2-1b", "expansion-tinyllama"])
@pytest.mark.parametrize("kv_sharing", [True, False])
def test_the_papers_expansions_have_the_shape_that_expansion_gives(name, kv_sharing):
    whole = preset(name + "-air" * kv_sharing)
    llama = slice_config(whole, 1)
    assert _expanded_config(replace(llama, kv_sharing=True), (32, 8), kv_sharing) == whole


def test_existing_blocks_are_copied_and_the_tied_head_is_untied(source, tmp_path):
    larger = expand(source.path, tmp_path / "larger", (6, 2))
    assert not larger.config.tie_embeddings
    names = [
        "embedding.chain1",
        "layers.0.attention.wk.chain1",
        "layers.1.ffn.down.chain1",
        "final_norm.chain1",
    ]
    old, new = source.tensors(names), larger.tensors([*names, "head.chain1"])
    assert all(torch.equal(old[name], new[name]) for name in names)
    head = "embedding.chain1" if source.config.tie_embeddings else "head.chain1"
    assert torch.equal(new["head.chain1"], source.tensors([head])[head])


def test_widths_grow_with_the_heads_and_the_rest_stays(source, tmp_path):
    config = expand(source.path, tmp_path / "larger", [6, 2]).config
    assert (config.chains, config.num_heads, config.num_kv_heads) == ((6, 2), 8, 2)
    assert (config.dim, config.hidden_dim, config.head_dim) == (8 * 16, 8 * 24, 16)
    assert (config.rope_theta, config.num_layers, config.kv_sharing) == (5000.0, 2, True)


def test_fresh_weights_start_as_documented(source, tmp_path):
    larger = expand(source.path, tmp_path / "larger", (6, 6), seed=3)
    tensors = larger.tensors(
        ["embedding.chain2", "layers.0.attention.wo.chain2", "layers.0.ffn_norm.chain2", "head.chain2"]
    )
    assert tensors["embedding.chain2"].std().item() == pytest.approx(0.02, rel=0.05)
    assert tensors["layers.0.attention.wo.chain2"].std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.05)
    assert torch.equal(tensors["layers.0.ffn_norm.chain2"], torch.ones(96))
    biased = expand(
        tiny_checkpoint(tmp_path / "biased", tiny_config(chains=(6,), bias=True)).path, tmp_path / "b", (6, 2)
    )
    assert not biased.tensors(["layers.0.ffn.up.chain2_bias"])["layers.0.ffn.up.chain2_bias"].any()
    assert not tensors["head.chain2"].any()


def test_seed_decides_the_fresh_weights(source, tmp_path):
    name = "embedding.chain2"
    first, again, other = (
        expand(source.path, tmp_path / f"larger{index}", (6, 2), seed=seed).tensors([name])[name]
        for index, seed in enumerate((1, 1, 2))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tokenizer_and_text_conventions_are_carried_over(source, tmp_path):
    larger = expand(source.path, tmp_path / "larger", (6, 2))
    assert larger.text == source.text
    assert larger.tokenizer_path is not None
    assert source.tokenizer_path is not None
    assert larger.tokenizer_path.read_bytes() == source.tokenizer_path.read_bytes()


def test_expansion_in_place_replaces_the_source(source):
    before = logits(source)
    assert torch.equal(logits(expand(source.path, source.path, (6, 2))), before)


@pytest.mark.parametrize(
    ("chains", "message"),
    [
        ((6,), "must begin with the source's"),
        ((4, 2), "must begin with the source's"),
        ((), "must begin with the source's"),
        ((6, 3), "multiple of num_kv_heads=2"),
        ((6, 0), "positive head counts"),
    ],
)
def test_chains_that_do_not_extend_the_source_are_refused(source, tmp_path, chains, message):
    with pytest.raises(UnsupportedModel, match=message):
        expand(source.path, tmp_path / "larger", chains)


def test_width_that_would_not_be_whole_is_refused(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", tiny_config(chains=(6,), hidden_dim=100))
    with pytest.raises(UnsupportedModel, match="hidden_dim=100 over 6 heads"):
        expand(source.path, tmp_path / "larger", (6, 2))
