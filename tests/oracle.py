"""The oracle of the system's greedy answers: the plain model, in one pass over prompt and answer.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from colm_kernels import tolerance
from torch import Tensor

from colm.model import ChainTransformer


@torch.inference_mode()
def logits_TV(model: ChainTransformer, token_ids: Sequence[int], num_chains: int) -> Tensor:
    """Logits at every position."""
    return model(torch.tensor([list(token_ids)]), num_chains)[0]


def assert_greedy(model: ChainTransformer, prompt: Sequence[int], answer: Sequence[int], num_chains: int) -> None:
    """Each token of the answer is the oracle's argmax after the tokens before it.

    By induction the answer then equals the oracle's own greedy answer. If a token differs, its exact logit, in
    float64, may be below the largest by no more than float32's rounding explains.
    """
    answered = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
    token_ids = [*prompt, *answer]
    if logits_TV(model, token_ids, num_chains)[answered].argmax(dim=1).tolist() == list(answer):
        return
    exact_TV = logits_TV(model.double(), token_ids, num_chains)[answered]
    model.float()
    config = model.config
    for exact_V, token_id in zip(exact_TV, answer, strict=True):
        expected = tolerance.layers(exact_V, torch.float32, num_layers=config.num_layers, width=config.dim)
        expected.check_largest(token_id)
