"""The manifests fit KubeRay's schema, and the project: its options, its roles, its version of Ray."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.options import ClusterConfig, load_config
from cluster.serve_config import serve_config
from colm.wire.members import Member
from tests.kuberay import problems

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
MANIFESTS = {each["kind"]: each for each in yaml.safe_load_all((FOLDER / "colm.yaml").read_text())}
CLUSTER = MANIFESTS["RayCluster"]["spec"]
SERVICE = yaml.safe_load((FOLDER / "rayservice.yaml").read_text())


def config(tmp_path: Path) -> ClusterConfig:
    file = tmp_path / "colm.toml"
    file.write_text(MANIFESTS["ConfigMap"]["data"]["colm.toml"])
    return load_config(file, {})


def mounts(pod: dict[str, Any]) -> set[str]:
    return {mount["mountPath"] for container in pod["containers"] for mount in container["volumeMounts"]}


def test_each_role_has_as_many_pods_as_replicas(tmp_path: Path) -> None:
    found = {group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}
    options = config(tmp_path)
    for section in options.placed.values():
        group = found[section.resource]
        # A shell reads it: quoted once for that.
        assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {section.resource: 1}
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == section.num_replicas


def test_pods_have_what_the_options_name(tmp_path: Path) -> None:
    options = config(tmp_path)
    pods = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in pods):
        (init,) = pod["initContainers"]
        assert str(options.security.folder) in init["command"][-1]
        assert {"/models", "/etc/colm", str(options.security.folder.parent)} <= mounts(pod)  # type: ignore[union-attr]
        secret = next(volume["secret"] for volume in pod["volumes"] if volume["name"] == "secret")
        assert secret["secretName"].removeprefix("colm-") in {member.value for member in Member}
        assert {container["image"] for container in pod["containers"]} == {init["image"]}


def test_ports_are_those_of_the_gateway(tmp_path: Path) -> None:
    gateway = config(tmp_path).gateway
    (head,) = CLUSTER["headGroupSpec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert (ports["grpc"], ports["https"]) == (gateway.port, gateway.wanted_http_port)
    assert ports["metrics"] == config(tmp_path).metrics.port
    served = {port["name"]: port["port"] for port in MANIFESTS["Service"]["spec"]["ports"]}
    assert served == {name: ports[name] for name in ("grpc", "https")}


def test_the_guide_names_the_ports_of_the_gateway(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    options = config(tmp_path)
    ports = (options.gateway.port, options.gateway.wanted_http_port, options.metrics.port)
    said = re.findall(r"colm-gateway:(\d+)|HEAD:(\d+)|\bon\s+(\d{4,5})\b", page)
    assert {int("".join(groups)) for groups in said} == {*ports}


def test_ray_is_the_pinned_one_and_demands_a_token() -> None:
    pinned = re.search(r"^ray==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert CLUSTER["rayVersion"] == pinned[1]
    assert CLUSTER["authOptions"] == {"mode": "token"}


def test_kuberay_takes_the_manifests() -> None:
    assert problems(MANIFESTS["RayCluster"]) == []
    assert problems(SERVICE) == []


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("headGroupSpec", "template", "spec", "containers", 0, "imagee"), "x", "'imagee' was unexpected"),
        (("workerGroupSpecs", 0, "replicas"), "1", "is not of type 'integer'"),
        (("authOptions", "mode"), "tokens", "is not one of"),
        (("rayversion",), "2.60.0", "'rayversion' was unexpected"),
    ],
)
def test_the_schema_refuses_what_kuberay_would(place: tuple[Any, ...], value: object, said: str) -> None:
    broken = copy.deepcopy(MANIFESTS["RayCluster"])
    where = broken["spec"]
    for step in place[:-1]:
        where = where[step]
    where[place[-1]] = value
    (found,) = problems(broken)
    assert said in found


def test_the_service_deploys_the_options_of_the_cluster(tmp_path: Path) -> None:
    assert yaml.safe_load(SERVICE["spec"]["serveConfigV2"]) == json.loads(serve_config(config(tmp_path)))


def test_the_pods_of_the_service_are_those_of_the_cluster() -> None:
    """But for the file of options, two ports that KubeRay wants, and probes that would ask for Serve's proxy.

    Where a head container names its ports, KubeRay adds none, and looks for the dashboard's by its name.
    """
    service = copy.deepcopy(SERVICE["spec"]["rayClusterConfig"])
    (head,) = service["headGroupSpec"]["template"]["spec"]["containers"]
    ports = [{"name": "dashboard", "containerPort": 8265}, {"name": "serve", "containerPort": 8000}]
    assert head["ports"][-2:] == ports
    head["ports"] = head["ports"][:-2]
    for group in service["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        assert container.pop("readinessProbe")["httpGet"] == {"path": "/api/healthz", "port": 52365}
    cluster = copy.deepcopy(CLUSTER)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        pod["volumes"] = [each for each in pod["volumes"] if each["name"] != "config"]
        (container,) = pod["containers"]
        container["volumeMounts"] = [each for each in container["volumeMounts"] if each["name"] != "config"]
    assert service == cluster
    assert SERVICE["spec"]["excludeHeadPodFromServeSvc"] is True


def test_the_policy_is_for_the_pods_of_either() -> None:
    selects = MANIFESTS["NetworkPolicy"]["spec"]["podSelector"]["matchExpressions"]
    assert selects == [{"key": "colm/role", "operator": "Exists"}]
    for spec in (CLUSTER, SERVICE["spec"]["rayClusterConfig"]):
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert "colm/role" in group["template"]["metadata"]["labels"]


def test_the_image_leaves_out_what_git_does() -> None:
    """Bug: the virtual environment, the models and everything that was built went into the image."""
    left_out = (ROOT / "deploy" / "image" / "Dockerfile.dockerignore").read_text().split("\n")
    built = [word.removesuffix("/") for word in (ROOT / ".gitignore").read_text().split()]
    assert [word for word in built if word not in left_out and f"**/{word}" not in left_out] == []
