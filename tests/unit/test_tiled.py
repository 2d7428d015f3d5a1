"""The paper's tiled order of query heads, turned into ours."""

import pytest
import torch
from colm_kernels import tolerance

from colm.convert import from_tiled
from colm.model.config import ChainConfig
from tests.masked_model import MaskedModel
from tests.tiny import random_tensors, tiny_checkpoint, tiny_config

SHAPES = {
    "three chains": tiny_config(chains=(8, 4, 4), bias=True),
    "one chain": tiny_config(chains=(6,)),
    "four kv heads": tiny_config(chains=(4, 8), num_kv_heads=4),
    "nothing to move": tiny_config(chains=(2, 2)),
}
TOKENS_T = torch.randint(320, (23,), generator=torch.Generator().manual_seed(1))


class TiledModel(MaskedModel):
    """The paper's listing repeats the kv heads as a whole until there is one for each query head."""

    def kv_head_of(self, head: int) -> int:
        return head % self.config.num_kv_heads


@torch.inference_mode()
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_an_imported_model_computes_the_tiled_formula(tmp_path, config: ChainConfig):
    tiled = tiny_checkpoint(tmp_path / "tiled", config, tokenizer=True)
    ours = from_tiled(tiled.path, tmp_path / "grouped")
    reference = {name: tensor.double() for name, tensor in random_tensors(config).items()}
    grouped = {name: tensor.double() for name, tensor in ours.tensors(reference).items()}
    for num_chains in range(1, config.num_chains + 1):
        expected = TiledModel(config, reference).logits(TOKENS_T, num_chains)
        # Both sum the same terms, so only a wrong permutation makes more than another order's rounding.
        tolerance.reordered(expected).check(MaskedModel(config, grouped).logits(TOKENS_T, num_chains))
    assert ours.text == tiled.text
    assert ours.tokenizer_json() == tiled.tokenizer_json()


@torch.inference_mode()
def test_a_tiled_model_that_is_not_imported_computes_something_else():
    """This shows that the test above can tell the two orders apart."""
    config = SHAPES["three chains"]
    tensors = random_tensors(config)
    tiled, grouped = TiledModel(config, tensors), MaskedModel(config, tensors)
    assert (tiled.logits(TOKENS_T, 1) - grouped.logits(TOKENS_T, 1)).abs().max() > 0.1


def test_only_query_rows_and_output_columns_move(tmp_path):
    config = SHAPES["three chains"]
    tiled = tiny_checkpoint(tmp_path / "tiled", config)
    before = random_tensors(config)
    after = from_tiled(tiled.path, tmp_path / "grouped").tensors(before)
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    queries = {name for name in before if ".wq." in name}
    outputs = {name for name in before if ".wo." in name and not name.endswith("_bias")}
    # With chains of 4 heads over 2 kv heads every chain has heads that move.
    assert moved == queries | outputs
    for name in moved:
        assert torch.equal(after[name].flatten().sort().values, before[name].flatten().sort().values)


def test_without_kv_sharing_the_paper_groups_and_nothing_moves(tmp_path):
    config = tiny_config(kv_sharing=False, num_kv_heads=4)
    tiled = tiny_checkpoint(tmp_path / "tiled", config)
    ours = from_tiled(tiled.path, tmp_path / "grouped")
    assert ours.weights_path.read_bytes() == tiled.weights_path.read_bytes()
