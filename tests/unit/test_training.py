"""Frozen chains have no graph, keep nothing, and cost no products and no time; a step of training learns."""

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from colm.checkpoint import load, save
from colm.convert import expand
from colm.model import ChainTransformer
from colm.model.config import ChainConfig
from colm.training.objective import scale_losses
from colm.training.stages import chain_of, train_chains, train_head, train_step
from tests.tiny import in_memory, random_tensors, tiny_checkpoint, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

SHARING = pytest.mark.parametrize("kv_sharing", [True, False], ids=["CoLM-Air", "CoLM"])


def config_of(kv_sharing: bool) -> ChainConfig:
    """Three chains of which the first is most of the model."""
    return tiny_config(
        chains=(12, 2, 2), kv_sharing=kv_sharing, num_kv_heads=2 if kv_sharing else 8, bias=True, vocab_size=64
    )


def batch(config: ChainConfig, num_sequences: int = 4, num_tokens: int = 33) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(config.vocab_size, (num_sequences, num_tokens), generator=generator)


@SHARING
@pytest.mark.parametrize("num_frozen", [0, 1, 2])
def test_frozen_chains_carry_no_graph_and_get_no_gradient(num_frozen, kv_sharing):
    model = tiny_model(config_of(kv_sharing))
    train_chains(model, num_frozen=num_frozen)
    xs = model.hidden_states(batch(model.config))
    assert [x.grad_fn is not None for x in xs] == [chain >= num_frozen for chain in range(3)]
    scale_losses(model, batch(model.config)).total.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is (chain_of(name) > num_frozen), name


@SHARING
def test_no_frozen_parameter_is_reached_from_the_loss(kv_sharing):
    """The leaves of the loss's graph are exactly the parameters that train."""
    model = tiny_model(config_of(kv_sharing))
    trained = train_chains(model, num_frozen=1)
    seen, leaves, stack = set(), set(), [scale_losses(model, batch(model.config)).total.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        stack += [following for following, _ in node.next_functions]
    assert leaves == {id(parameter) for parameter in trained}


def kept_bytes(model: ChainTransformer, scales: list[int]) -> int:
    """Memory that the graph keeps for the backward pass, without the weights; each storage once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        scale_losses(model, batch(model.config, 8, 65), scales)
    return sum(storage.nbytes() for storage in kept.values())


@SHARING
def test_frozen_chains_keep_less_memory(kv_sharing):
    """The graph keeps the inputs of live products, those from frozen chains too, and nothing else of frozen layers."""
    model = tiny_model(config_of(kv_sharing))
    train_chains(model)
    all_bytes = kept_bytes(model, [3])
    train_chains(model, num_frozen=2)
    live_bytes = kept_bytes(model, [3])
    train_head(model)
    head_bytes = kept_bytes(model, [3])
    assert live_bytes < 0.6 * all_bytes
    # The head's own gradient, made on the way, and nothing of any layer.
    assert head_bytes <= 4 * sum(parameter.numel() for parameter in model.head.parameters())


def backward_flops(model: ChainTransformer, scale: int) -> int:
    losses = scale_losses(model, batch(model.config), [scale])
    with FlopCounterMode(display=False) as counter:
        losses.total.backward()
    return counter.get_total_flops()


@SHARING
def test_head_training_computes_nothing_behind_the_head(kv_sharing):
    model = tiny_model(config_of(kv_sharing))
    train_head(model)
    assert backward_flops(model, 3) == 0


def linear_backward_macs(config: ChainConfig, num_frozen: int) -> int:
    """Backward multiply-adds of all linears for one row: live weights, and live inputs of live outputs."""

    def macs(in_dims: tuple[int, ...], out_dims: tuple[int, ...]) -> int:
        total = 0
        for chain in range(num_frozen, len(out_dims)):
            width = sum(in_dims[: chain + 1])
            total += out_dims[chain] * (width + width - sum(in_dims[:num_frozen]))
        return total

    dims, hidden, queries = config.chain_dims, config.chain_hidden_dims, config.chain_query_dims
    kv_dims = tuple(heads * config.head_dim for heads in config.chain_kv_heads)
    one_layer = macs(dims, queries) + 2 * macs(dims[: len(kv_dims)], kv_dims) + macs(queries, dims)
    return config.num_layers * (one_layer + 2 * macs(dims, hidden) + macs(hidden, dims))


@SHARING
@pytest.mark.parametrize("num_frozen", [0, 1, 2])
def test_backward_products_are_those_of_live_chains_and_no_other(num_frozen, kv_sharing):
    """The flop counter lists attention separately; all other products are the linears', counted exactly."""
    config = config_of(kv_sharing)
    model = tiny_model(config)
    train_chains(model, num_frozen=num_frozen)
    losses = scale_losses(model, batch(config), [3])
    with FlopCounterMode(display=False) as counter:
        losses.total.backward()
    counted = sum(
        flops for operation, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(operation)
    )
    num_rows = batch(config)[:, 1:].numel()
    assert counted == 2 * num_rows * linear_backward_macs(config, num_frozen)


@SHARING
def test_the_backward_pass_shrinks_with_what_is_frozen(kv_sharing):
    """15/16 of the widths are frozen: about 1/9 of the products remain; the limit is 1/2."""
    config = tiny_config(
        chains=(30, 2), kv_sharing=kv_sharing, num_kv_heads=2 if kv_sharing else 16, hidden_dim=32 * 40, num_layers=3
    )
    model = tiny_model(config)
    train_chains(model)
    whole = backward_flops(model, 2)
    train_chains(model, num_frozen=1)
    assert backward_flops(model, 2) < 0.5 * whole


@pytest.mark.parametrize(
    "choose", [train_chains, lambda model: train_chains(model, num_frozen=1), train_head], ids=["all", "later", "head"]
)
@SHARING
def test_steps_reduce_the_loss_of_every_scale_and_leave_the_frozen_alone(
    choose: Callable[[ChainTransformer], list[torch.nn.Parameter]], kv_sharing
):
    model = tiny_model(config_of(kv_sharing))
    trained = {id(parameter) for parameter in choose(model)}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if id(parameter) in trained], lr=3e-3)
    tokens_BT = batch(model.config)
    losses = [train_step(model, optimizer, tokens_BT).by_scale for _ in range(15)]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is (id(parameter) not in trained), name
    live_scales = [scale for scale in (1, 2, 3) if losses[-1][scale] != losses[0][scale]]
    assert live_scales == ([2, 3] if not model.head.chain1.requires_grad else [1, 2, 3])
    assert all(losses[-1][scale] < 0.9 * losses[0][scale] for scale in live_scales)


def test_an_expanded_model_learns_and_its_first_chain_answers_as_before(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", tiny_config(chains=(6,)))
    expanded = expand(source.path, tmp_path / "larger", (6, 2))
    stored = expanded.weights_path.read_bytes()
    model, tokens_BT = load(expanded.path), batch(expanded.config)
    optimizer = torch.optim.AdamW(train_chains(model, num_frozen=1), lr=1e-2)
    losses = [train_step(model, optimizer, tokens_BT, [2]).by_scale[2] for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    trained = save(tmp_path / "trained", expanded.config, {n: p.detach() for n, p in model.named_parameters()})
    with torch.inference_mode():
        assert torch.equal(in_memory(trained, 1)(tokens_BT), in_memory(source)(tokens_BT))
    assert expanded.weights_path.read_bytes() == stored


def test_bfloat16_trains():
    model = tiny_model(dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(train_chains(model, num_frozen=1), lr=0.5)
    losses = [train_step(model, optimizer, batch(model.config), [3]).by_scale[3] for _ in range(10)]
    assert losses[-1] < losses[0]


def test_a_tied_head_cannot_be_trained_alone():
    model = tiny_model(tiny_config(tie_embeddings=True))
    with pytest.raises(ValueError, match="tie_embeddings=True"):
        train_head(model)


@pytest.mark.parametrize("num_frozen", [-1, 3])
def test_freezing_nothing_or_everything_by_mistake_is_refused(num_frozen):
    with pytest.raises(ValueError, match=f"num_frozen={num_frozen} must be between 0 and 2"):
        train_chains(tiny_model(), num_frozen=num_frozen)


def test_every_parameter_has_a_chain():
    config = tiny_config(bias=True)
    assert {chain_of(name) for name in random_tensors(config)} == {1, 2, 3}
