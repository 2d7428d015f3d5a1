"""Cross entropy of every scale, without ever holding the logits of two scales or of all tokens.

Shapes: R rows (tokens that have a next one), C rows of a chunk, D_i features of chain i, V vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from colm.model import ChainTransformer
from colm.model.embedding import nested_logits

CHUNK_TOKENS = 1024
"""Rows whose logits exist at one time; large enough for full speed of a product with the head."""


@dataclass(frozen=True, slots=True)
class ScaleLosses:
    """Mean cross entropy of the next token."""

    total: Tensor
    """Sum over the scales; differentiable."""
    by_scale: dict[int, float]


def scale_losses(
    model: ChainTransformer,
    tokens_BT: Tensor,
    scales: Collection[int] | None = None,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> ScaleLosses:
    """Losses of whole sequences at several scales, all from one pass through the layers.

    The paper's first stage is the largest scale alone, its second all scales with nothing but the head trained:
    see `colm.training.stages`.

    Args:
        model: gradients go to its parameters that require them.
        tokens_BT: int64 token ids, T >= 2; each predicts the next.
        scales: 1..n each; None for all. Chains beyond the largest are not computed.
        chunk_tokens: rows whose logits exist at one time.

    Raises:
        ValueError: no scale, one outside the model, or sequences of one token.
    """
    wanted = sorted(set(range(1, model.num_chains + 1) if scales is None else scales))
    if not wanted or wanted[0] < 1 or wanted[-1] > model.num_chains:
        raise ValueError(f"scales={wanted} must be between 1 and {model.num_chains}, at least one")
    if tokens_BT.shape[1] < 2:
        raise ValueError(f"tokens_BT has {tokens_BT.shape[1]} tokens a sequence; at least 2 are needed")
    xs = model.hidden_states(tokens_BT[:, :-1], wanted[-1])
    columns = model.output_table.matrices(wanted[-1])
    labels_R = tokens_BT[:, 1:].flatten()
    total, *losses = _NestedCrossEntropy.apply(labels_R, wanted, chunk_tokens, len(xs), *xs, *columns)
    return ScaleLosses(total, {scale: loss.item() for scale, loss in zip(wanted, losses, strict=True)})


class _NestedCrossEntropy(torch.autograd.Function):
    """Scales from the largest down, chunk by chunk; gradients are made on the way, so that no logits are kept.

    The gradient of chain i's part of the logits is the sum over all scales that contain chain i. From the largest scale
    down terms are only added to that sum, so each chain is multiplied with its head columns once.
    """

    @staticmethod
    def forward(
        ctx: Any, labels_R: Tensor, scales: Sequence[int], chunk_tokens: int, num_chains: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        xs, columns = tensors[:num_chains], tensors[num_chains:]
        # Sums over many rows, so never in half precision.
        wide = torch.promote_types(xs[0].dtype, torch.float32)
        needed = ctx.needs_input_grad[4:]
        grads = [
            torch.zeros_like(tensor, dtype=wide) if need else None for tensor, need in zip(tensors, needed, strict=True)
        ]
        # Chains before it are frozen, and so is every scale made of those alone.
        first_live = min((index % num_chains for index, need in enumerate(needed) if need), default=num_chains)
        losses = {scale: xs[0].new_zeros((), dtype=wide) for scale in scales}
        num_rows = len(labels_R)
        for start in range(0, num_rows, chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            chunk = [x[rows] for x in xs]
            grad_CV: Tensor | None = None
            for chain in reversed(range(num_chains)):
                if chain + 1 in losses:
                    logits_CV = nested_logits(chunk[: chain + 1], columns[: chain + 1]).to(wide)
                    losses[chain + 1] += F.cross_entropy(logits_CV, labels_R[rows], reduction="sum") / num_rows
                    if chain >= first_live:
                        step_CV = _cross_entropy_gradient(logits_CV, labels_R[rows], num_rows)
                        grad_CV = step_CV if grad_CV is None else grad_CV.add_(step_CV)
                if grad_CV is not None and chain >= first_live:
                    of_x, of_columns = grads[chain], grads[num_chains + chain]
                    narrow_CV = grad_CV.to(xs[0].dtype)
                    if of_x is not None:
                        of_x[rows] = narrow_CV @ columns[chain]
                    if of_columns is not None:
                        of_columns += narrow_CV.T @ chunk[chain]
        stored = [None if grad is None else grad.to(xs[0].dtype) for grad in grads]
        ctx.save_for_backward(*stored)
        ctx.mark_non_differentiable(*losses.values())
        return torch.stack(list(losses.values())).sum(), *losses.values()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors]
        return None, None, None, None, *scaled


def _cross_entropy_gradient(logits_CV: Tensor, labels_C: Tensor, num_rows: int) -> Tensor:
    """Gradient of the mean over `num_rows` with respect to the logits: softmax - one-hot. Overwrites the logits."""
    grad_CV = logits_CV.sub_(logits_CV.logsumexp(dim=1, keepdim=True)).exp_()
    grad_CV[torch.arange(len(labels_C), device=labels_C.device), labels_C] -= 1
    return grad_CV.div_(num_rows)
