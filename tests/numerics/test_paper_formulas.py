"""The model against the paper's formulas written with masks, at every scale."""

from itertools import product
from typing import Any

import pytest
import torch
from colm_kernels import tolerance

from colm.checkpoint import assign
from colm.model import ChainTransformer
from colm.model.config import ChainConfig
from tests.masked_model import MaskedModel
from tests.tiny import random_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

SHARING = {"CoLM-Air": True, "CoLM": False}
FORMS = {
    "swiglu": {},
    "gelu": {"activation": "gelu"},
    "swiglu with biases": {"bias": True},
    "gelu with biases": {"activation": "gelu", "bias": True},
}


def config_of(*, kv_sharing: bool, gqa: int, head_dim: int = 16, **values: Any) -> ChainConfig:
    """Three unequal chains; `gqa` query heads for each kv head in the smallest of them."""
    chains = (gqa, 2 * gqa, gqa)
    num_heads = sum(chains)
    return ChainConfig(
        chains=chains,
        num_heads=num_heads,
        num_kv_heads=1 if kv_sharing else 4,
        kv_sharing=kv_sharing,
        dim=head_dim * num_heads,
        hidden_dim=12 * num_heads,
        vocab_size=97,
        **{"num_layers": 2} | values,
    )


def assert_follows_the_formulas(config: ChainConfig, dtype: torch.dtype, num_tokens: int) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(config).items()}
    model = ChainTransformer(config)
    assign(model, tensors, None)
    reference = MaskedModel(config, {name: tensor.double() for name, tensor in tensors.items()})
    tokens_T = torch.randint(97, (num_tokens,), generator=torch.Generator().manual_seed(5))
    for num_chains in range(1, config.num_chains + 1):
        exact = reference.logits(tokens_T, num_chains)
        expected = tolerance.layers(exact, dtype, num_layers=config.num_layers, width=config.dim)
        expected.check(model(tokens_T[None], num_chains)[0])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_sharing", SHARING.values(), ids=SHARING.keys())
@pytest.mark.parametrize(("gqa", "form"), list(product((1, 2, 4, 8), FORMS)), ids=str)
def test_every_form_and_gqa_ratio_follows_the_formulas(gqa, form, kv_sharing, dtype):
    assert_follows_the_formulas(config_of(kv_sharing=kv_sharing, gqa=gqa, **FORMS[form]), dtype, num_tokens=23)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_sharing", SHARING.values(), ids=SHARING.keys())
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_every_head_dim_follows_the_formulas(head_dim, kv_sharing, dtype):
    config = config_of(kv_sharing=kv_sharing, gqa=2, head_dim=head_dim, num_layers=1)
    assert_follows_the_formulas(config, dtype, num_tokens=17)


@torch.inference_mode()
@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33])
@pytest.mark.parametrize("kv_sharing", SHARING.values(), ids=SHARING.keys())
def test_every_length_follows_the_formulas(kv_sharing, num_tokens):
    config = config_of(kv_sharing=kv_sharing, gqa=2, tie_embeddings=True, explicit_head_dim=24)
    assert_follows_the_formulas(config, torch.float32, num_tokens)
