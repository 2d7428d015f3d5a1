"""The manifests fit the project: its options, its roles, its version of Ray."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from cluster.application import DECODE_RESOURCE, PREFILL_RESOURCE
from cluster.options import ClusterConfig, load_config
from colm.wire.members import Member

ROOT = Path(__file__).parents[2]
MANIFESTS = {
    each["kind"]: each for each in yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "colm.yaml").read_text())
}
CLUSTER = MANIFESTS["RayCluster"]["spec"]


def config(tmp_path: Path) -> ClusterConfig:
    file = tmp_path / "colm.toml"
    file.write_text(MANIFESTS["ConfigMap"]["data"]["colm.toml"])
    return load_config(file, {})


def mounts(pod: dict[str, Any]) -> set[str]:
    return {mount["mountPath"] for container in pod["containers"] for mount in container["volumeMounts"]}


def test_each_role_has_as_many_pods_as_replicas(tmp_path: Path) -> None:
    found = {group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}
    options = config(tmp_path)
    for resource, section in ((PREFILL_RESOURCE, options.prefill), (DECODE_RESOURCE, options.decode)):
        group = found[resource]
        # A shell reads it: quoted once for that.
        assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {resource: 1}
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


def test_ray_is_the_pinned_one_and_demands_a_token() -> None:
    pinned = re.search(r"^ray==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert CLUSTER["rayVersion"] == pinned[1]
    assert CLUSTER["authOptions"] == {"mode": "token"}
