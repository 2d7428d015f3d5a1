"""What Ray Serve builds of `colm config --serve` is what `colm up` deploys."""

import json
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from cluster import deployment
from cluster.application import build
from cluster.options import RaySection, load_config
from cluster.replicas import replica_numbers
from cluster.security.secret_files import SecretFiles
from cluster.serve_config import application, serve_config
from colm.errors import ClusterError, ConfigError

OPTIONS: dict[str, Any] = {
    "model.path": "/models/model",
    "security.folder": "/run/secrets",
    "ray.address": "auto",
    "decode.replicas": 2,
    "decode.kv_cache_bytes": "8GiB",
    "gateway.host": "0.0.0.0",
}


@pytest.fixture(autouse=True)
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[RaySection]:
    sections: list[RaySection] = []
    monkeypatch.setattr(deployment, "check_is_closed", sections.append)
    return sections


def parts(app: Any) -> list[tuple[Any, ...]]:
    """What an application deploys: names, arguments with handles by their names, and options."""
    built = build_app(app, name="colm", make_deployment_handle=lambda other, _: other.name)
    return [
        (
            each.name,
            each.func_or_class,
            each.init_args,
            each.init_kwargs,
            each._deployment_config,
            each.ray_actor_options,
        )
        for each in built.deployments
    ]


def test_serve_builds_what_up_deploys(looked_at: list[RaySection]) -> None:
    config = load_config(None, OPTIONS)
    secrets = SecretFiles.of(
        config.security, Path("/run/secrets"), clients_folder=Path("/run/secrets"), own_certificate=None
    )
    wanted = parts(build(config, Path("/models/model"), secrets))
    (read,) = ServeDeploySchema.model_validate(json.loads(serve_config(config))).applications
    assert [name for name, *_ in wanted] == ["prefill", "decode", "gateway"]
    assert parts(application(read.args)) == wanted
    assert looked_at == [config.ray]


def test_where_the_load_says_how_many_serve_lets_the_gateway_say_it_and_goes_on_with_those(
    looked_at: list[RaySection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_numbers, "kept_numbers", lambda _: {"prefill": 3, "decode": 9, "gateway": 1})
    config = load_config(None, OPTIONS | {"prefill.max_replicas": 4})
    (read,) = ServeDeploySchema.model_validate(json.loads(serve_config(config))).applications
    assert read.external_scaler_enabled
    numbers = {name: made.num_replicas for name, _, _, _, made, _ in parts(application(read.args))}
    assert numbers == {"prefill": 3, "decode": config.decode.replicas, "gateway": 1}
    assert not looked_at[0].insecure


def test_serve_has_no_proxies_and_no_route() -> None:
    read = ServeDeploySchema.model_validate(json.loads(serve_config(load_config(None, OPTIONS))))
    assert read.proxy_location == "Disabled"
    assert read.applications[0].route_prefix is None


@pytest.mark.parametrize(
    ("missing", "left_out"), [("model.path", {"model.path"}), ("security.folder", {"security.folder", "ray.address"})]
)
def test_what_each_machine_needs_is_demanded(missing: str, left_out: set[str]) -> None:
    options = {name: value for name, value in OPTIONS.items() if name not in left_out}
    with pytest.raises(ConfigError, match=f"{missing} is not set"):
        serve_config(load_config(None, options))


@pytest.mark.parametrize("name", ["model.path", "security.folder"])
def test_a_path_that_depends_on_where_it_is_read_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}='some/where' must be a whole path"):
        serve_config(load_config(None, OPTIONS | {name: "some/where"}))


def test_a_variants_path_too_is_the_same_on_every_machine() -> None:
    with pytest.raises(ConfigError, match=r"model.variants.legal.path='some/where' must be a whole path"):
        serve_config(load_config(None, OPTIONS | {"model.variants": {"legal": {"path": "some/where"}}}))


def test_serve_refuses_what_up_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    args = json.loads(serve_config(load_config(None, OPTIONS)))["applications"][0]["args"]
    with pytest.raises(ConfigError, match="in plaintext"):
        application(args | {"security": {"folder": "/run/secrets", "tls": "off"}})

    def is_open(_: RaySection) -> str:
        raise ClusterError("answers without a token")

    monkeypatch.setattr(deployment, "check_is_closed", is_open)
    with pytest.raises(ClusterError, match="without a token"):
        application(args)
