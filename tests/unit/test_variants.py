"""Several models of one chain 1: one prefill pool and what it keeps, decode nodes of their own, chosen by name."""

import asyncio
import dataclasses
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI
from prometheus_client import CollectorRegistry

from cluster.application import build
from cluster.change import as_kept, changed, is_another_model, require_same_weights, weights_stamps
from cluster.front_door.front_door import FrontDoor, Variant
from cluster.metrics import UNKNOWN
from cluster.node_registry import NodeRegistry
from cluster.options import ClusterConfig, load_config
from cluster.variants import require_one_chain_1
from colm.checkpoint import Checkpoint
from colm.clock import MonotonicClock
from colm.errors import ClusterError, ConfigError
from colm.events import Accepted, Event, Resumed
from colm.nodes import Role
from tests.clock import FakeClock
from tests.gates import LIMIT_S
from tests.gateway import LIMITS, TakingTurns, decode_nodes, http_gateway, served_model
from tests.nodes import TILE_TOKENS, decode, decode_node, prefill_node
from tests.scripted_nodes import FINISHED
from tests.secret_folder import secret_files
from tests.tiny import fine_tuned, tiny_checkpoint, tiny_config

LEGAL = dataclasses.replace(served_model(tiny_config()), name="legal", revision="l")
DOCUMENT = np.random.default_rng(0).integers(3, 300, 3 * TILE_TOKENS).tolist()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def legal(base: Checkpoint) -> Checkpoint:
    return fine_tuned(base.path.parent / "legal", base)


async def test_a_question_to_another_model_finds_the_document_that_the_first_one_had_computed(
    base: Checkpoint, legal: Checkpoint
) -> None:
    question = [*DOCUMENT, 7, 8, 9, 10, 11]
    counted = CollectorRegistry()

    async with (
        prefill_node(str(base.path), prefix_cache_bytes=16 << 20) as prefill,
        decode_node(str(base.path), [prefill.address]) as node,
        decode_node(str(legal.path), [prefill.address]) as other,
        http_gateway(
            base.config,
            TakingTurns([node.address]),
            variants=[Variant(model=LEGAL, decode_pool=TakingTurns([other.address]))],
            metrics=counted,
        ) as address,
        AsyncOpenAI(base_url=f"http://{address}/v1", api_key="-", max_retries=0) as client,
    ):

        async def ask(model: str, token_ids: list[int]) -> tuple[list[int], float]:
            """The answer's tokens, and the prompt tokens that the prefill node computed for it."""
            before = prefill.metrics.get_sample_value("colm_prefill_tokens_total") or 0.0
            answer = await client.completions.create(
                model=model, prompt=token_ids, max_tokens=6, temperature=0, logprobs=1, extra_body={"ignore_eos": True}
            )
            assert answer.model == model
            said = answer.choices[0].logprobs
            assert said is not None
            after = prefill.metrics.get_sample_value("colm_prefill_tokens_total") or 0.0
            return [*map(int, said.tokens or ())], after - before

        assert [model.id for model in (await client.models.list()).data] == ["tiny", "legal"]
        assert (await client.models.retrieve("legal")).id == "legal"
        of_base, num_computed = await ask("tiny", [*DOCUMENT, 5, 6])
        assert num_computed == len(DOCUMENT) + 1
        of_legal, num_computed = await ask("legal", question)
        assert num_computed == len(question) - 1 - len(DOCUMENT)
        # Nobody's prompts: computed anew.
        plain: dict[str, Any] = {"num_chains": base.config.num_chains, "max_new_tokens": 6}
        assert list((await decode(other.address, question, **plain)).token_ids) == of_legal
        assert list((await decode(node.address, question, **plain)).token_ids) != of_legal
        assert list((await decode(node.address, [*DOCUMENT, 5, 6], **plain)).token_ids) == of_base
        with pytest.raises(openai.NotFoundError, match="this cluster serves 'tiny', 'legal'"):
            await ask("huge", question)
        with pytest.raises(openai.BadRequestError, match="must be between"):
            await client.completions.create(model="legal", prompt=question, max_tokens=10**6)

    def ended(model: str, outcome: str) -> float | None:
        return counted.get_sample_value("colm_requests_ended_total", {"model": model, "outcome": outcome})

    assert [ended(name, "complete") for name in ("tiny", "legal")] == [1, 1]
    assert ended(UNKNOWN, "unknown_model") == 1
    assert ended("legal", "invalid_request") == 1, "refused before it was accepted"


class Held:
    """Decode nodes that hold an answer; asked for it, they say so."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def leave_answers(self) -> None:
        raise AssertionError

    def decode(self, *_: object, **__: object) -> AsyncGenerator[Event]:
        raise AssertionError

    async def resume(self, address: str, *_: object, **__: object) -> AsyncGenerator[Event]:
        self.asked.append(address)
        yield Resumed(request_id="r", num_prompt_tokens=3, num_chains=1, max_new_tokens=9, remaining_s=9.0)
        yield FINISHED


def of_variant(registry: NodeRegistry, name: str) -> NodeRegistry:
    """The same nodes, which serve a further model."""
    changed = NodeRegistry(FakeClock())
    for node in registry.nodes():
        changed.report(dataclasses.replace(node.report, variant=name))
    return changed


async def test_an_answer_of_a_lost_gateway_is_the_models_whose_node_holds_it() -> None:
    registry = of_variant(decode_nodes(1, ["there"]), "legal")
    front_door = FrontDoor(
        model=served_model(tiny_config()),
        limits=LIMITS,
        decode_pool=TakingTurns([]),
        calls=Held(),
        registry=registry,
        clock=MonotonicClock(),
        variants=[Variant(model=LEGAL, decode_pool=TakingTurns(["there"]))],
    )
    async with asyncio.timeout(LIMIT_S), front_door.resume("0" * 32, 0) as events:
        accepted = await anext(events)
    assert isinstance(accepted, Accepted)
    assert (accepted.model, accepted.revision) == ("legal", "l")
    assert [registry.serving(name).count(Role.DECODE) for name in ("", "legal")] == [0, 1]


def options(base: Checkpoint, *variants: Path, **own: Any) -> ClusterConfig:
    """With further models in these folders, and options of their own by name."""
    known = {path.name: {"path": path} | own.get(path.name, {}) for path in variants}
    return load_config(None, {"model.path": base.path, "model.dtype": "float32", "model.variants": known})


def test_each_variant_has_a_decode_pool_and_all_have_one_prefill_pool(
    base: Checkpoint, legal: Checkpoint, tmp_path: Path
) -> None:
    secrets = secret_files(tmp_path)

    def deployed(config: ClusterConfig, **more: Any) -> dict[str, Any]:
        found = {}
        waiting: list[Any] = [build(config, base.path, secrets, **more)._bound_deployment]
        while waiting:
            deployment = waiting.pop()
            found[deployment.name] = deployment
            waiting += [each._bound_deployment for each in deployment.init_args if hasattr(each, "_bound_deployment")]
        return found

    config = options(base, legal.path, legal={"replicas": 2, "max_replicas": 4, "weights": "int8", "resource": "big"})
    found = deployed(config)
    numbers = {name: deployment.num_replicas for name, deployment in found.items()}
    assert numbers == {"gateway": 1, "decode": 1, "decode-legal": 2, "prefill": 1}
    kept = deployed(config, kept={"decode": 3, "decode-legal": 3})
    assert [kept[name].num_replicas for name in ("decode", "decode-legal")] == [1, 3]
    assert config.num_decode_replicas == 5
    weights = {name: found[name].init_args[0].settings.weights for name in ("decode", "decode-legal")}
    assert weights == {"decode": "stored", "decode-legal": "int8"}
    placed = {name: found[name].ray_actor_options["resources"] for name in ("prefill", "decode", "decode-legal")}
    assert placed == {"prefill": {"prefill": 1}, "decode": {"decode": 1}, "decode-legal": {"big": 1}}
    # A change of its options is its own, and where it goes its replicas stay as they are for the last gateway.
    other = deployed(options(base, legal.path, legal={"replicas": 2, "max_replicas": 4}))
    assert {name for name in found if found[name].version != other[name].version} == {"decode-legal"}
    without = options(base)
    leaving = deployed(without, leaving=config.model.variants)
    assert {name for name in found if found[name].version != leaving[name].version} == {"gateway"}
    gone = deployed(without)
    assert {name: each.version for name, each in gone.items()} == {name: leaving[name].version for name in gone}
    assert set(found) - set(gone) == {"decode-legal"}


def test_a_variant_of_another_chain_1_is_refused_by_name(base: Checkpoint, legal: Checkpoint, tmp_path: Path) -> None:
    require_one_chain_1(options(base, legal.path), base)
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"model.variants.other.path=.* has another chain 1 .* a cluster of its own"):
        require_one_chain_1(options(base, legal.path, other.path), base)
    with pytest.raises(ConfigError, match="'tiny' is no name of its own"):
        require_one_chain_1(options(base, base.path), base)


def test_a_variant_comes_and_goes_in_place_and_another_checkpoint_of_its_name_needs_a_successor(
    base: Checkpoint, legal: Checkpoint, tmp_path: Path
) -> None:
    alone, both = options(base), options(base, legal.path)
    assert not is_another_model(alone, both)
    assert not is_another_model(both, alone)
    assert is_another_model(both, options(base, tmp_path / "elsewhere" / "legal"))
    assert ClusterConfig.model_validate(as_kept(both)).model.variants == both.model.variants
    assert changed(as_kept(both), alone) == {"model.variants.legal.path": (str(legal.path), None)}
    assert changed(as_kept(alone), both) == {"model.variants.legal.path": (None, str(legal.path))}
    own = {"legal": {"weights": "int8", "replicas": 2}}
    assert changed(as_kept(both), options(base, legal.path, **own)) == {
        "model.variants.legal.weights": ("stored", "int8"),
        "model.variants.legal.replicas": (1, 2),
    }


def test_weights_of_a_variant_that_are_written_anew_are_refused(base: Checkpoint, tmp_path: Path) -> None:
    """Bug: those of the model alone were looked at, and a variant's replica that restarted would read others."""
    variant = fine_tuned(tmp_path / "variant", base)
    config = options(base, variant.path)
    known = weights_stamps(config, base)
    require_same_weights(known, config, base)
    os.utime(variant.weights_path, ns=(1, 1))
    with pytest.raises(ClusterError, match=f"{variant.weights_path} was written anew"):
        require_same_weights(known, config, base)
    require_same_weights(known, options(base), base)
