"""The scaler in the gateway: what nodes report becomes a number that Serve is told, and a state that people see."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from cluster.autoscaling.autoscaler import Autoscaler
from cluster.autoscaling.policy import ScalingLimits
from cluster.autoscaling.signals import DecodeSignal, PoolScaling, PrefillSignal
from cluster.cli.top import _screen
from cluster.node_registry import NodeRegistry
from cluster.options import load_config
from cluster.replicas.decode import ServePrefillPool
from cluster.top import Watch
from colm.errors import ClusterError, ConfigError
from colm.nodes import ClusterStatus, NodeLoad, NodeReport, PoolStatus, ProcessFacts, PromptCost, Role
from colm.wire.messages import cluster_status_from_pb, cluster_status_to_pb
from tests.clock import FakeClock
from tests.gates import settle
from tests.unit.test_serve_lender import ScriptedHandle, grant

LIMITS = ScalingLimits(min_replicas=1, max_replicas=4, up_s=5, down_s=20)
PREFILL = PoolScaling(role=Role.PREFILL, limits=LIMITS, target=10.0)
DECODE = PoolScaling(role=Role.DECODE, limits=LIMITS, target=0.5)
COST = PromptCost(token_s=0.01, pair_s=0.0001)


def prefill(replica_id: str = "p", *, active: int = 0, work_s: float = 0.0, engine_s: float = 0.0) -> NodeReport:
    load = NodeLoad(work_s=work_s, engine_s=engine_s, prompt_cost=COST)
    return report(Role.PREFILL, replica_id, active=active, load=load)


def decode(replica_id: str = "d", *, active: int = 0, used: int = 0, load: NodeLoad) -> NodeReport:
    return replace(report(Role.DECODE, replica_id, active=active, load=load), num_pages_total=100, num_pages_used=used)


def report(role: Role, replica_id: str, *, active: int, load: NodeLoad) -> NodeReport:
    return NodeReport(
        role=role,
        replica_id=replica_id,
        ray_node_id="here",
        address=replica_id,
        num_active_requests=active,
        num_queued_requests=0,
        num_leases=0,
        process=ProcessFacts(pid=1, host="here", resident_bytes=0),
        load=load,
    )


class Numbers:
    """Serve, as far as it is told numbers."""

    def __init__(self, **kept: int) -> None:
        self.kept = kept
        self.told: list[tuple[str, int]] = []
        self.is_deaf = False

    async def now(self) -> Mapping[str, int]:
        if self.is_deaf:
            raise ClusterError("Ray Serve does not answer")
        return self.kept

    async def tell(self, pool: str, num_replicas: int) -> None:
        if self.is_deaf:
            raise ClusterError("Ray Serve does not answer")
        self.told.append((pool, num_replicas))


class Cluster:
    """A registry, a scaler before it, and a second between two looks."""

    def __init__(self, *scalings: PoolScaling, numbers: Numbers, num_waiting: Mapping[str, int] = {}) -> None:
        self.clock = FakeClock()
        self.registry = NodeRegistry(self.clock)
        self.numbers = numbers
        self.scaler = Autoscaler(
            scalings, self.registry, numbers, self.clock, lambda variant: num_waiting.get(variant, 0)
        )

    async def look(self, *reports: NodeReport, seconds: int = 1) -> None:
        for _ in range(seconds):
            self.clock.now_s += 1
            for each in reports:
                self.registry.report(each)
            await self.scaler.look()


async def test_a_queue_brings_replicas_and_its_end_takes_them_away() -> None:
    cluster = Cluster(PREFILL, numbers=Numbers(prefill=1, decode=1))
    await cluster.look(prefill(active=5, work_s=25.0), seconds=7)
    assert cluster.numbers.told == [("prefill", 1), ("prefill", 2), ("prefill", 3)]
    (pool,) = cluster.registry.pools
    assert (pool.num_present, pool.num_wanted, pool.demand, pool.queued_s) == (1, 3, 2.5, 25.0)
    await cluster.look(prefill("p"), prefill("q"), prefill("r"), seconds=26)
    assert cluster.numbers.told[-1] == ("prefill", 1)


async def test_a_new_gateway_goes_on_with_the_replicas_that_there_are() -> None:
    cluster = Cluster(PREFILL, numbers=Numbers(prefill=3))
    await cluster.look(prefill("p"), prefill("q"), prefill("r"), seconds=19)
    assert cluster.numbers.told == [("prefill", 3)]


async def test_serve_that_does_not_answer_is_told_at_a_later_look() -> None:
    cluster = Cluster(PREFILL, DECODE, numbers=Numbers())
    busy = prefill(active=9, work_s=90.0)
    cluster.numbers.is_deaf = True
    with pytest.raises(ClusterError):
        await cluster.look(busy)
    cluster.numbers.is_deaf = False
    await cluster.look(busy, seconds=2)
    cluster.numbers.is_deaf = True
    for _ in range(5):
        with pytest.raises(ClusterError):
            await cluster.look(busy)
    cluster.numbers.is_deaf = False
    await cluster.look(busy)
    assert cluster.numbers.told[-1] == ("prefill", 4)
    cluster.numbers.told.clear()
    await cluster.look(busy, seconds=60)
    again = {("prefill", 4), ("decode", 1)}
    assert set(cluster.numbers.told) == again, "whatever else may have changed it"


def test_prompts_that_wait_for_a_prefill_node_count_by_their_lengths() -> None:
    signal = PrefillSignal(target_queue_s=10.0)
    waiting = decode(load=NodeLoad(waiting_tokens=(100, 1000)))
    load = signal.look([prefill(active=1, work_s=3.0), waiting], 1.0)
    assert load.queued_s == pytest.approx(3.0 + (1 + 1) + (10 + 100))
    assert load.demand == 3
    assert signal.look([waiting], 2.0).queued_s == pytest.approx(112), "they have not become less with the node"


def test_engines_that_work_hold_their_replicas() -> None:
    signal = PrefillSignal(target_queue_s=10.0)
    signal.look([prefill("p", engine_s=50.0)], 100.0)
    load = signal.look([prefill("p", engine_s=51.5), prefill("new", engine_s=7.0)], 102.0)
    assert load.demand == pytest.approx(0.75)
    assert signal.look([prefill("p", engine_s=0.0), prefill("new", engine_s=99.0)], 104.0).demand == 1.0


async def test_each_models_decode_pool_follows_its_own_load_and_the_prefill_pool_that_of_all() -> None:
    """Bug: prompts of further models that waited for a prefill node brought none."""
    legal = replace(DECODE, variant="legal")
    numbers = Numbers(**{"prefill": 1, "decode": 1, "decode-legal": 2})
    cluster = Cluster(PREFILL, DECODE, legal, numbers=numbers, num_waiting={"legal": 6})
    own = decode(used=90, active=1, load=NodeLoad(num_places=10))
    of_legal = replace(decode("l", active=4, load=NodeLoad(num_places=4, waiting_tokens=(1000, 1000))), variant="legal")
    await cluster.look(own, of_legal, prefill(), seconds=7)
    pools = {pool.name: pool for pool in cluster.registry.pools}
    assert {name: pool.num_present for name, pool in pools.items()} == {"prefill": 1, "decode": 1, "decode-legal": 1}
    assert pools["prefill"].queued_s == pytest.approx(2 * COST.seconds(1000))
    assert (pools["decode"].demand, pools["decode-legal"].demand) == pytest.approx((90 / 100 / 0.5, 10 / 4 / 0.5))
    assert ("decode-legal", 4) in numbers.told
    assert ("decode", 2) in numbers.told


def test_the_line_for_prefill_is_shared_by_the_models_whose_prompts_stand_in_it() -> None:
    signal = DecodeSignal(0.5, lambda: 0, "legal")
    load = NodeLoad(num_places=10, num_prefilling=4, num_pages_prefilling=80)
    own = replace(decode(used=80, load=load), variant="legal")
    # 8 prompts of two models for 2 engines: 6 of 8 of each model's stand in line.
    engines = [prefill(name, active=4) for name in ("p", "q")]
    found = signal.look([own, decode("other", used=80, load=load), *engines], 1.0)
    assert found.demand == pytest.approx((80 - 6 / 8 * 80) / 100 / 0.5)


def test_pages_that_are_waited_for_and_requests_in_the_gateways_line_ask_for_decode_nodes() -> None:
    places = NodeLoad(num_places=10, num_pages_wanted=60)
    assert DecodeSignal(0.5, lambda: 0).look([decode(used=90, active=2, load=places)], 1.0).demand == 3.0
    assert DecodeSignal(0.5, lambda: 18).look([decode(used=10, active=2, load=places)], 1.0).demand == 4.0
    lost = DecodeSignal(0.5, lambda: 20)
    assert lost.look([], 1.0).demand == 0.0
    lost.look([decode(load=places)], 2.0)
    assert lost.look([], 3.0).demand == 4.0


def test_what_stands_in_line_for_prefill_is_no_load_of_the_decode_pool() -> None:
    """Bug: a prefill pool that was too small brought decode nodes, which only lengthened its line."""
    signal = DecodeSignal(0.5, lambda: 90)
    # All pages and 9 of 10 requests are those of prompts, 8 of which have no engine.
    load = NodeLoad(num_places=10, num_prefilling=9, num_pages_prefilling=90, num_pages_wanted=900)
    full = replace(decode(used=100, active=1, load=load), num_queued_requests=9)
    engines = prefill(active=9)
    own_pages = 100 - 8 / 9 * 90
    assert signal.look([full, engines], 1.0).demand == pytest.approx(own_pages * (1 + 900 / 100) / 100 / 0.5)
    idle = prefill(active=1)
    assert signal.look([full, idle], 2.0).demand == pytest.approx((100 + 900) / 100 / 0.5), "it is the pages that lack"


async def test_a_decode_node_tells_which_prompts_wait_for_a_prefill_node() -> None:
    handle = ScriptedHandle()
    pool = ServePrefillPool(handle, max_waiting=8)

    async def beat(num_ahead: int) -> None: ...

    lending = pool.lease(num_tokens=77, beat=beat, preferred=None, refused_by=())
    entering = asyncio.ensure_future(lending.__aenter__())
    await settle()
    assert pool.waiting_tokens == (77,)
    await grant(handle.calls[0], "a", "1")
    await entering
    assert len(pool.waiting_tokens) == 0
    await lending.__aexit__(None, None, None)
    pool.close()


STATUS = PoolStatus(
    role=Role.DECODE,
    variant="legal",
    num_present=1,
    num_wanted=3,
    min_replicas=1,
    max_replicas=4,
    demand=2.25,
    queued_s=0.0,
)
QUEUE = replace(STATUS, role=Role.PREFILL, variant="", queued_s=41.5)


def test_pools_cross_the_wire_and_are_shown() -> None:
    status = ClusterStatus(models=(), nodes=(), num_active_requests=0, pools=(STATUS, QUEUE))
    assert cluster_status_from_pb(cluster_status_to_pb(status)) == status
    console = Console(width=160)
    with console.capture() as shown_text:
        console.print(_screen(Watch(lambda: status, lambda _: None).look()))
    shown = shown_text.get()
    assert all(word in shown for word in ("decode-legal", "1 to 4", "2.25", "41.5 s"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[prefill]\nreplicas = 2\nstandby = 1\nmax_replicas = 2",
            "prefill.max_replicas=2 is below prefill.replicas=2",
        ),
        ("[decode]\nscale_up_s = 60\nscale_down_s = 30", "decode.scale_down_s=30 is below decode.scale_up_s=60"),
        (
            '[decode]\nreplicas = 3\n[model.variants.legal]\npath = "l"\nmax_replicas = 2',
            "model.variants.legal.max_replicas=2 is below model.variants.legal.replicas=3",
        ),
        ("[model.variants.legal]\nreplicas = 2", "model.variants.legal.path is not set"),
        ('[model]\nvariants = {legal = "l"}', r"model.variants.legal='l' must be a section: \[model.variants.legal\]"),
        ('[decode]\nresource = "GPU"', "decode.resource='GPU' is Ray's own"),
        ('[ray]\napplication = "A b"', "ray.application='A b'"),
        ('[model.variants."a/b"]\npath = "l"', "model.variants: 'a/b' is no name"),
        ('[model.variants.legal]\npath = "l"\nspeed = 1', "model.variants.legal.speed is not an option"),
        ("[decode]\ntarget_use = 1.5", "decode.target_use=1.5"),
        ("[prefill]\ntarget_queue_s = 0", "prefill.target_queue_s=0"),
    ],
)
def test_options_that_contradict_are_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "colm.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "colm.toml", {})


def test_nothing_is_scaled_unless_more_replicas_are_allowed() -> None:
    off = load_config(None, {})
    assert [section.scaling for section in off.placed.values()] == [None, None]
    assert load_config(None, {"prefill.replicas": 2, "prefill.max_replicas": 2}).prefill.scaling is None
    on = load_config(None, {"prefill.standby": 1, "prefill.max_replicas": 4, "decode.max_replicas": 2})
    assert on.prefill.scaling == PoolScaling(
        role=Role.PREFILL, limits=ScalingLimits(min_replicas=2, max_replicas=4), target=10.0
    )
    assert on.decode.scaling is not None
    assert on.decode.scaling.target == 0.8


def test_a_variant_is_scaled_as_decode_is_unless_its_section_says_otherwise() -> None:
    sections = {
        "legal": {"path": "l"},
        "code": {"path": "c", "max_replicas": 5, "target_use": 0.5},
        "one": {"path": "o"},
    }
    sections["one"]["max_replicas"] = 1
    config = load_config(None, {"decode.max_replicas": 2, "decode.weights": "int8", "model.variants": sections})
    assert [(each.name, each.limits.max_replicas, each.target) for each in config.scalings] == [
        ("decode", 2, 0.8),
        ("decode-legal", 2, 0.8),
        ("decode-code", 5, 0.5),
    ]
    assert {section.weights for section in config.decode_pools.values()} == {"int8"}
    assert config.num_decode_replicas == 2 + 2 + 5 + 1
