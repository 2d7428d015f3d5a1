"""What the whole system's greedy answers are held against: the plain model, in one pass over prompt and answer.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from colm_kernels.tolerance import budget
from torch import Tensor

from colm.model import ChainTransformer


@torch.inference_mode()
def logits_TV(model: ChainTransformer, token_ids: Sequence[int], num_chains: int) -> Tensor:
    """Logits at every position."""
    return model(torch.tensor([list(token_ids)]), num_chains)[0]


def assert_greedy(model: ChainTransformer, prompt: Sequence[int], answer: Sequence[int], num_chains: int) -> None:
    """Each token of the answer is the oracle's argmax after the tokens before it.

    By induction that is equality with the oracle's own greedy answer. Where the token differs, the oracle's gap
    between the two must be inside its own rounding error, measured against float64.
    """
    answered = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
    token_ids = [*prompt, *answer]
    ours_TV = logits_TV(model, token_ids, num_chains)[answered]
    best_T = ours_TV.argmax(dim=1)
    if best_T.tolist() == list(answer):
        return
    reference_TV = logits_TV(model.double(), token_ids, num_chains)[answered]
    model.float()
    allowed = budget(ours_TV, reference_TV)
    for position, token_id in enumerate(answer):
        gap = float(ours_TV[position].max() - ours_TV[position, token_id])
        assert gap <= allowed, (
            f"token {position} is {token_id}, the oracle's {int(best_T[position])} leads by {gap:.3e}"
        )
