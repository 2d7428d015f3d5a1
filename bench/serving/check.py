"""Whether a system answers as the model does.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from colm_kernels import tolerance
from numpy.typing import NDArray

from colm.checkpoint import Checkpoint


@torch.inference_mode()
def check_greedy(
    checkpoint: Checkpoint, dtype: torch.dtype, prompt_T: NDArray[np.int64], answer_T: Sequence[int]
) -> None:
    """Hold a greedy answer at all chains against the plain model in float64, with the weights of the dtype.

    Raises:
        AssertionError: a token is not the likeliest by more than the dtype's rounding explains.
    """
    model, config = checkpoint.load(dtype=dtype).double(), checkpoint.config
    token_ids_T = np.concatenate([prompt_T, np.array(answer_T, dtype=np.int64)])
    logits_TV = model(torch.from_numpy(token_ids_T[:-1]).unsqueeze(0))[0][len(prompt_T) - 1 :]
    for logits_V, token_id in zip(logits_TV, answer_T, strict=True):
        expected = tolerance.layers(logits_V, dtype, num_layers=config.num_layers, width=config.dim)
        expected.check_largest(token_id)
