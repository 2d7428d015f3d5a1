"""The loss of every scale and its gradients are right, computed one chunk of one scale at a time."""

from collections.abc import Iterable

import pytest
import torch
from colm_kernels import tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from colm.model import ChainTransformer
from colm.training.objective import scale_losses
from colm.training.stages import train_chains, train_head
from tests.shapes import chain_configs
from tests.tiny import tiny_config, tiny_model


def tokens_of(model: ChainTransformer, num_tokens: int = 14) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (2, num_tokens), generator=torch.Generator().manual_seed(5))


def plain_loss(model: ChainTransformer, tokens_BT: torch.Tensor, scale: int) -> torch.Tensor:
    logits = model(tokens_BT[:, :-1], scale).flatten(0, 1)
    return F.cross_entropy(logits, tokens_BT[:, 1:].flatten())


def gradients(model: ChainTransformer) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@settings(max_examples=25)
@given(config=chain_configs(), chunk_tokens=st.sampled_from((1, 5, 25, 26, 27, 1000)), data=st.data())
def test_losses_and_gradients_are_those_of_plain_cross_entropy(config, chunk_tokens, data):
    scales = data.draw(st.sets(st.integers(1, config.num_chains), min_size=1))
    model = tiny_model(config, dtype=torch.float64)
    train_chains(model)
    tokens_BT = tokens_of(model)
    plain = {scale: plain_loss(model, tokens_BT, scale) for scale in sorted(scales)}
    torch.stack(list(plain.values())).sum().backward()
    expected = gradients(model)
    losses = scale_losses(model, tokens_BT, scales, chunk_tokens=chunk_tokens)
    losses.total.backward()
    ours = gradients(model)
    assert list(losses.by_scale) == sorted(scales)
    assert_equal_but_for_the_order_of_sums(
        [torch.tensor(list(losses.by_scale.values()), dtype=torch.float64)], [torch.stack([*plain.values()])]
    )
    assert_equal_but_for_the_order_of_sums([losses.total], [sum(plain.values())])
    assert ours.keys() == expected.keys()
    assert_equal_but_for_the_order_of_sums(ours.values(), expected.values())


def assert_equal_but_for_the_order_of_sums(ours: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
    ours, expected = (torch.cat([tensor.detach().flatten() for tensor in side]) for side in (ours, expected))
    tolerance.reordered(expected).check(ours)


def test_no_scale_named_means_all():
    model = tiny_model()
    assert list(scale_losses(model, tokens_of(model)).by_scale) == [1, 2, 3]


def test_the_gradient_scales_with_what_comes_after():
    model = tiny_model(dtype=torch.float64)
    train_head(model)
    scale_losses(model, tokens_of(model)).total.backward()
    once = gradients(model)
    (3 * scale_losses(model, tokens_of(model)).total).backward()
    assert_equal_but_for_the_order_of_sums(gradients(model).values(), [3 * grad for grad in once.values()])


@pytest.mark.parametrize("scales", [[], [0], [4], [1, 4]])
def test_scales_outside_the_model_are_refused(scales):
    model = tiny_model()
    with pytest.raises(ValueError, match="must be between 1 and 3"):
        scale_losses(model, tokens_of(model), scales)


def test_a_sequence_of_one_token_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="at least 2"):
        scale_losses(model, tokens_of(model, num_tokens=1))


class LogitsInMemory(TorchDispatchMode):
    """Largest share of the batch's logits that one operation made, in any copy."""

    def __init__(self, model: ChainTransformer) -> None:
        super().__init__()
        self.vocab_size = model.config.vocab_size
        self.tables = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.most_rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_as_wide = isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == self.vocab_size
        if is_as_wide and out.untyped_storage().data_ptr() not in self.tables:
            self.most_rows = max(self.most_rows, out.shape[0])
        return out


def test_logits_exist_for_one_chunk_only():
    """The vocabulary is odd, so that no other tensor has that width."""
    model = tiny_model(tiny_config(vocab_size=331))
    train_chains(model)
    with LogitsInMemory(model) as seen:
        scale_losses(model, tokens_of(model, num_tokens=101), chunk_tokens=16).total.backward()
    assert seen.most_rows == 16


def test_no_logits_are_kept_for_the_backward_pass():
    model = tiny_model(tiny_config(vocab_size=331))
    train_chains(model)
    kept: list[torch.Size] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = scale_losses(model, tokens_of(model, num_tokens=101), chunk_tokens=16)
    assert kept
    assert not [shape for shape in kept if len(shape) > 1 and shape[-1] == 331]
    losses.total.backward()
