"""A model that takes the place of a running one: in which order, and what is left where that fails."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.serve._private.common import ReplicaState

from cluster import deployment
from cluster.options import load_config
from cluster.serve_names import names_of
from colm.errors import ClusterError

APPLICATION, SUCCESSOR = names_of("colm")
CONFIG = load_config(None, {"gateway.drain_s": 7.0})


class Site:
    """A Ray that runs some applications; `steps` is what was done to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *there: str, free: float = 1.0) -> None:
        self.steps: list[Any] = []
        self.there = list(there)
        self.fails_when_open: bool | None = None
        """Whether it is the closed or the open gateway that does not come up."""
        monkeypatch.setattr(deployment, "_connect", lambda _: None)
        monkeypatch.setattr(deployment, "check_is_closed", lambda _: "gcs")
        monkeypatch.setattr(
            deployment, "_ours", lambda cluster: [name for name in names_of(cluster) if name in self.there]
        )
        monkeypatch.setattr(deployment, "_run", self._run)
        monkeypatch.setattr(deployment, "_drain", self._drain)
        monkeypatch.setattr(deployment.serve, "delete", self._delete)
        monkeypatch.setattr(deployment.serve, "status", lambda: SimpleNamespace(applications=self.there))
        monkeypatch.setattr(deployment.serve, "shutdown", lambda: self.steps.append("shutdown"))
        monkeypatch.setattr(deployment.ray, "shutdown", lambda: None)
        monkeypatch.setattr(deployment.ray, "available_resources", lambda: {"prefill": free, "decode": free})

    def succeed(self, last: str) -> None:
        nothing: Any = None
        deployment.succeed(
            last, CONFIG, nothing, nothing, "ray", when_open=lambda name: self.steps.append(("state", name))
        )

    def _run(
        self, name: str, *_: object, is_open: bool = True, after: str = "", leaving: Any = (), **__: object
    ) -> None:
        assert after in ("", self.there[-1])
        self.steps.append(("run", name, is_open, *leaving))
        if is_open is self.fails_when_open:
            raise ClusterError("the replicas did not start")

    def _drain(self, name: str, drain_s: float, *, successor: str | None = None) -> None:
        self.steps.append(("drain", name, drain_s, successor))

    def _delete(self, name: str) -> None:
        self.steps.append(("delete", name))


@pytest.mark.parametrize(("last", "name"), [(APPLICATION, SUCCESSOR), (SUCCESSOR, APPLICATION)])
def test_the_last_model_goes_when_the_next_one_serves_and_its_answers_have_ended(
    monkeypatch: pytest.MonkeyPatch, last: str, name: str
) -> None:
    site = Site(monkeypatch, last)
    site.succeed(last)
    assert site.steps == [
        ("run", name, False),
        ("run", name, True),
        ("state", name),
        ("drain", last, 7.0, name),
        ("delete", last),
    ]


@pytest.mark.parametrize("is_open", [False, True])
def test_a_model_that_does_not_come_up_leaves_the_last_one_as_it_was(
    monkeypatch: pytest.MonkeyPatch, is_open: bool
) -> None:
    site = Site(monkeypatch, APPLICATION)
    site.fails_when_open = is_open
    with pytest.raises(ClusterError, match="did not start"):
        site.succeed(APPLICATION)
    assert site.steps[-1] == ("delete", SUCCESSOR)
    assert not [step for step in site.steps if step[:2] == ("drain", APPLICATION) or step[0] == "state"]


def test_what_a_killed_change_left_is_removed_before_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(monkeypatch, APPLICATION, SUCCESSOR)
    site.succeed(SUCCESSOR)
    assert site.steps[:2] == [("delete", APPLICATION), ("run", APPLICATION, False)]


def test_a_ray_without_room_for_both_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(monkeypatch, APPLICATION, free=0.0)
    with pytest.raises(
        ClusterError, match="beside the model that runs, the Ray cluster has free 0 of resource 'prefill' and needs 1"
    ):
        site.succeed(APPLICATION)
    assert site.steps == []


def test_down_lets_answers_end_before_any_node_is_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(monkeypatch, APPLICATION, SUCCESSOR)
    deployment.remove("ray", "colm", SUCCESSOR, 7.0)
    assert site.steps == [("drain", SUCCESSOR, 7.0, None), ("delete", APPLICATION), ("delete", SUCCESSOR)]
    site = Site(monkeypatch)
    deployment.remove("ray", "colm", APPLICATION, 7.0)
    assert site.steps == ["shutdown"]


def test_a_variant_goes_when_the_gateway_that_knew_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    site, nothing = Site(monkeypatch, APPLICATION), cast(Any, None)
    monkeypatch.setattr(deployment, "check_resources", lambda *_: None)
    monkeypatch.setattr(deployment.ray, "cluster_resources", lambda: None)
    monkeypatch.setattr(deployment, "kept_numbers", lambda _: {})
    states = iter([{ReplicaState.RUNNING: 1, ReplicaState.STOPPING: 1}, {ReplicaState.RUNNING: 1}])

    def status() -> Any:
        gateway = SimpleNamespace(replica_states=next(states))
        site.steps.append("look")
        return SimpleNamespace(applications={APPLICATION: SimpleNamespace(deployments={"gateway": gateway})})

    monkeypatch.setattr(deployment.serve, "status", status)
    monkeypatch.setattr(deployment, "_POLL_S", 0.0)
    leaving: Any = {"legal": None}
    deployment.change(APPLICATION, CONFIG, nothing, nothing, "ray", beside=True, leaving=leaving)
    assert site.steps == [("run", APPLICATION, True, "legal"), "look", "look", ("run", APPLICATION, True)]


OTHER = load_config(None, {"ray.application": "other", "gateway.port": 6000, "prefill.resource": "big"})


def beside(site: Site, monkeypatch: pytest.MonkeyPatch, *, resources: dict[str, float]) -> None:
    """Bring up another cluster on the Ray of one whose gateway listens at 5000 and 5001."""
    nothing = cast(Any, None)
    there = {name: SimpleNamespace(deployments={"gateway": 1, "prefill": 1, "decode": 1}) for name in site.there}
    foreign = {"stranger": SimpleNamespace(deployments={"gateway": 1})}
    monkeypatch.setattr(deployment.serve, "status", lambda: SimpleNamespace(applications=there | foreign))
    said = SimpleNamespace(result=lambda timeout_s: ("host:5000", "host:5001"))  # noqa: ARG005
    handle = SimpleNamespace(addresses=SimpleNamespace(remote=lambda: said))
    monkeypatch.setattr(deployment.serve, "get_deployment_handle", lambda _, name: {APPLICATION: handle}[name])
    monkeypatch.setattr(deployment.serve, "start", lambda **_: site.steps.append("start"))
    monkeypatch.setattr(deployment.ray, "available_resources", lambda: resources)
    deployment.deploy(OTHER, nothing, nothing, "ray", lambda address: site.steps.append(("note", address)))


def test_a_cluster_beside_another_takes_what_is_free_and_leaves_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(monkeypatch, APPLICATION)
    beside(site, monkeypatch, resources={"big": 1, "decode": 1})
    assert site.steps == ["start", ("note", "gcs"), ("run", "other", True)]
    site = Site(monkeypatch, APPLICATION, "other", "other-successor")
    deployment.remove("ray", "other", "other", 7.0)
    assert site.steps == [("drain", "other", 7.0, None), ("delete", "other"), ("delete", "other-successor")]


def test_a_cluster_beside_another_is_refused_what_that_one_has(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(monkeypatch, APPLICATION)
    with pytest.raises(ClusterError, match="beside colm, stranger, the Ray cluster has free 0 of resource 'big'"):
        beside(site, monkeypatch, resources={"prefill": 1, "decode": 1})
    for option, value in (("gateway.port", 5000), ("gateway.http_port", 5001)):
        monkeypatch.setitem(globals(), "OTHER", load_config(None, {"ray.application": "other", option: value}))
        with pytest.raises(ClusterError, match=f"{option}={value} is a port of the application 'colm' on this Ray"):
            beside(site, monkeypatch, resources={"prefill": 1, "decode": 1})
    monkeypatch.setitem(globals(), "OTHER", CONFIG)
    with pytest.raises(ClusterError, match="runs a 'colm' application already; run `colm down` there, or choose"):
        beside(site, monkeypatch, resources={"prefill": 1, "decode": 1})
    assert site.steps == []
