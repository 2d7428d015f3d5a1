"""Several models of one chain 1: one prefill pool and what it keeps, decode nodes of their own, chosen by name."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI

from cluster.application import build
from cluster.change import as_kept, is_another_model
from cluster.front_door.front_door import FrontDoor, Variant
from cluster.node_registry import NodeRegistry
from cluster.options import ClusterConfig, load_config
from cluster.variants import require_one_chain_1
from colm.checkpoint import Checkpoint
from colm.clock import MonotonicClock
from colm.errors import ConfigError
from colm.events import Accepted, Event, Resumed
from colm.nodes import Role
from tests.clock import FakeClock
from tests.gates import LIMIT_S
from tests.gateway import LIMITS, TakingTurns, decode_nodes, http_gateway, served_model
from tests.nodes import TILE_TOKENS, decode, decode_node, prefill_node
from tests.secret_folder import secret_files
from tests.tiny import fine_tuned, tiny_checkpoint, tiny_config
from tests.unit.test_front_door import FINISHED

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

    async with (
        prefill_node(str(base.path), prefix_cache_bytes=16 << 20) as prefill,
        decode_node(str(base.path), [prefill.address]) as node,
        decode_node(str(legal.path), [prefill.address]) as other,
        http_gateway(
            base.config,
            TakingTurns([node.address]),
            variants=[Variant(model=LEGAL, decode_pool=TakingTurns([other.address]))],
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


def options(base: Checkpoint, *variants: Path) -> ClusterConfig:
    known = {path.name: str(path) for path in variants}
    return load_config(None, {"model.path": base.path, "model.dtype": "float32", "model.variants": known})


def test_each_variant_has_a_decode_pool_and_all_have_one_prefill_pool(
    base: Checkpoint, legal: Checkpoint, tmp_path: Path
) -> None:
    config, found = options(base, legal.path), {}
    waiting: list[Any] = [build(config, base.path, secret_files(tmp_path))._bound_deployment]
    while waiting:
        deployment = waiting.pop()
        found[deployment.name] = deployment.num_replicas
        waiting += [each._bound_deployment for each in deployment.init_args if hasattr(each, "_bound_deployment")]
    assert found == {"gateway": 1, "decode": 1, "decode-legal": 1, "prefill": 1}
    assert config.num_decode_replicas == 2


def test_a_variant_of_another_chain_1_is_refused_by_name(base: Checkpoint, legal: Checkpoint, tmp_path: Path) -> None:
    require_one_chain_1(options(base, legal.path), base)
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"model.variants.other=.* has another chain 1 .* a cluster of its own"):
        require_one_chain_1(options(base, legal.path, other.path), base)
    with pytest.raises(ConfigError, match="'tiny' is no name of its own"):
        require_one_chain_1(options(base, base.path), base)


def test_a_further_variant_comes_in_place_and_one_that_goes_needs_a_successor(
    base: Checkpoint, legal: Checkpoint, tmp_path: Path
) -> None:
    alone, both = options(base), options(base, legal.path)
    assert not is_another_model(alone, both)
    assert is_another_model(both, alone)
    assert is_another_model(both, options(base, tmp_path / "elsewhere" / "legal"))
    assert ClusterConfig.model_validate(as_kept(both)).model.variants == {"legal": legal.path.resolve()}
