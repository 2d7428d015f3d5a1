"""Deploys the application on a running Ray cluster, and removes it. Importing this file imports Ray."""

import logging
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger, ReplicaState
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from cluster.options import ClusterConfig, RaySection, VariantSection
from cluster.ray_guard import check_token_mode
from cluster.replicas.replica_numbers import kept_numbers, tell_numbers
from cluster.security.secret_files import SecretFiles
from cluster.serve_names import GATEWAY, names_of
from colm.errors import ClusterError
from colm.nodes import Role
from colm.wire.endpoint import join_address

if TYPE_CHECKING:
    from colm.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_CALL_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Deployed:
    """A running application."""

    gateway_address: str
    http_address: str
    ray_address: str


def deploy(
    config: ClusterConfig,
    checkpoint: "Checkpoint",
    secrets: SecretFiles,
    ray_address: str,
    before_placing: Callable[[str], None],
) -> Deployed:
    """Run the application on a Ray cluster and wait until every replica serves.

    Args:
        config: what to run.
        checkpoint: the model.
        secrets: at the same path on every machine.
        ray_address: the cluster to join.
        before_placing: called with Ray's own address before anything is placed; from then on a failure leaves something
            to `remove`.

    Raises:
        ClusterError: Ray cannot be joined, is open to everybody, lacks a role's resource, or a replica did not start.
    """
    try:
        _connect(ray_address)
        gcs_address, name = check_is_closed(config.ray), config.ray.application
        if ours := _ours(name):
            raise ClusterError(
                f"Ray at {ray_address} runs a {ours[0]!r} application already; run `colm down` there, or choose "
                "another ray.application for a cluster beside it"
            )
        if others := serve.status().applications:
            _require_own_ports(config, others)
            check_resources(config, ray.available_resources(), f"beside {', '.join(others)}, the Ray cluster has free")
        else:
            check_resources(config, ray.cluster_resources())
        serve.start(proxy_location="Disabled")
        before_placing(gcs_address)
        return _run(name, config, checkpoint, secrets, gcs_address)
    finally:
        # Ray kills a driver that is still connected when Ray stops.
        ray.shutdown()


def change(
    name: str,
    config: ClusterConfig,
    checkpoint: "Checkpoint",
    secrets: SecretFiles,
    ray_address: str,
    *,
    beside: bool,
    leaving: Mapping[str, VariantSection] = MappingProxyType({}),
) -> None:
    """Replace the running application by one of other options, and wait until every replica has them.

    Serve replaces the replicas of each pool in turn. Those that go finish what they have, or hand it over.

    Args:
        name: of the application.
        config: what to run.
        checkpoint: the model, the same as before.
        secrets: likewise.
        ray_address: where it runs.
        beside: start the next replicas before the last ones go, where there is room for both.
        leaving: variants that are not among the options any more; their answers have the gateway's `drain_s` to end.

    Raises:
        ClusterError: Ray cannot be reached, lacks a role's resource, runs no such application, or a replica did not
            start; then those that ran before go on.
    """
    try:
        _connect(ray_address)
        gcs_address = check_is_closed(config.ray)
        check_resources(config, ray.cluster_resources())
        _keep_only(name, config, ray_address)
        # Serve keeps a number that it was told, where nothing else about a deployment changes.
        told = kept_numbers(name)
        tell_numbers(
            name,
            {pool: each.num_replicas for pool, each in config.pools.items() if pool in told and each.scaling is None},
        )
        if leaving:
            _run(name, config, checkpoint, secrets, gcs_address, beside=beside, leaving=leaving)
            _wait_for_last_gateway(name, config.gateway.drain_s)
        _run(name, config, checkpoint, secrets, gcs_address, beside=beside)
    finally:
        ray.shutdown()


def succeed(
    last: str,
    config: ClusterConfig,
    checkpoint: "Checkpoint",
    secrets: SecretFiles,
    ray_address: str,
    *,
    when_open: Callable[[str], None],
) -> None:
    """Run another model's application beside the running one, then let it take the place of that.

    Its gateway begins to listen, on the same ports, when all its replicas are ready. The last one's then gets no new
    request; when those that are inside have ended, it goes with all its replicas.

    Args:
        last: name of the running application.
        config: what to run.
        checkpoint: the other model.
        secrets: the same as before.
        ray_address: where it runs.
        when_open: called with the successor's name when it has taken over; until then a failure leaves the last one as
            it was.

    Raises:
        ClusterError: Ray cannot be reached, has no room for both, runs no such application, or a replica did not start.
    """
    try:
        _connect(ray_address)
        gcs_address = check_is_closed(config.ray)
        _keep_only(last, config, ray_address)
        check_resources(config, ray.available_resources(), "beside the model that runs, the Ray cluster has free")
        (name,) = {*names_of(config.ray.application)} - {last}
        try:
            _run(name, config, checkpoint, secrets, gcs_address, is_open=False, after=last)
            _run(name, config, checkpoint, secrets, gcs_address)
        except BaseException:
            serve.delete(name)
            raise
        when_open(name)
        _drain(last, config.gateway.drain_s, successor=name)
        serve.delete(last)
    finally:
        ray.shutdown()


def remove(ray_address: str, cluster: str, name: str | None = None, drain_s: float = 0.0) -> None:
    """Remove a cluster of ours from a Ray cluster; shut Serve down as well if no other application runs.

    Args:
        ray_address: where it runs.
        cluster: `ray.application`.
        name: of the application that serves clients; None where none ever came up.
        drain_s: how long its gateway lets answers go on before the nodes end.

    Raises:
        ClusterError: Ray cannot be reached.
    """
    try:
        _connect(ray_address)
        ours = _ours(cluster)
        if name is not None and name in ours:
            _drain(name, drain_s)
        for each in ours:
            serve.delete(each)
        if not serve.status().applications:
            serve.shutdown()
    except (RayError, TimeoutError) as err:
        raise ClusterError(f"the application could not be taken off Ray at {ray_address}: {err}") from err
    finally:
        ray.shutdown()


def _ours(cluster: str) -> list[str]:
    """Names of a cluster's applications that are there."""
    there = serve.status().applications
    return [name for name in names_of(cluster) if name in there]


def _require_own_ports(config: ClusterConfig, others: Mapping[str, ApplicationStatusOverview]) -> None:
    """Refuse the ports of another cluster's gateway: both would listen there, and each get some of the calls."""
    for other, application in others.items():
        if not application.deployments.keys() >= {GATEWAY, *(role.value for role in Role)}:
            continue  # somebody else's
        gateway: Any = serve.get_deployment_handle(GATEWAY, other)
        try:
            addresses = gateway.addresses.remote().result(timeout_s=_CALL_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError) as err:
            raise ClusterError(
                f"the gateway of the application {other!r} on this Ray does not say its ports: {err}"
            ) from err
        taken = {int(address.rpartition(":")[2]) for address in addresses}
        for option, port in (("port", config.gateway.port), ("http_port", config.gateway.wanted_http_port)):
            if port in taken:
                raise ClusterError(
                    f"gateway.{option}={port} is a port of the application {other!r} on this Ray; choose another one"
                )


def _keep_only(name: str, config: ClusterConfig, ray_address: str) -> None:
    """Remove what a change of the model left that was killed; refuse a Ray without that application."""
    ours = _ours(config.ray.application)
    if name not in ours:
        raise ClusterError(f"Ray at {ray_address} runs no {name!r} application; run `colm down`, then `up`")
    for each in ours:
        if each != name:
            serve.delete(each)


def _drain(name: str, drain_s: float, *, successor: str | None = None) -> None:
    """Let a gateway's answers end; one that is lost has none."""
    gateway: Any = serve.get_deployment_handle(GATEWAY, name)
    try:
        gateway.drain.remote(drain_s, successor).result(timeout_s=drain_s + _CALL_TIMEOUT_S)
    except (RayError, RayServeException, TimeoutError) as err:
        logger.warning("gateway.not_drained cause=%r", err)


def check_is_closed(section: RaySection) -> str:
    """Refuse the Ray that this process is connected to if it was joined and is open to everybody.

    Returns:
        Its own address.

    Raises:
        ClusterError: says what is open.
    """
    gcs_address: str = ray.get_runtime_context().gcs_address
    if section.address is not None and not section.insecure:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        check_token_mode(
            gcs_address, [join_address(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in nodes]
        )
    return gcs_address


def _run(
    name: str,
    config: ClusterConfig,
    checkpoint: "Checkpoint",
    secrets: SecretFiles,
    gcs_address: str,
    *,
    beside: bool = False,
    is_open: bool = True,
    after: str = "",
    leaving: Mapping[str, VariantSection] = MappingProxyType({}),
) -> Deployed:
    """Run an application, and wait until every replica serves and, if it is open, the gateway listens.

    Where the load says how many replicas there are, it begins with as many as the one has that it comes `after`. The
    decode replicas of variants that are `leaving` go on, for the last gateway.
    """
    from cluster.application import build  # brings PyTorch, which `remove` has no use for

    kept = kept_numbers(name) or kept_numbers(after) if config.scalings else {}
    application = build(
        config,
        checkpoint.path.absolute(),
        secrets,
        name=name,
        beside=beside,
        is_open=is_open,
        kept=kept,
        leaving=leaving,
    )
    # Serve's own wait has no timeout and hides the cause of a failure; ours has the one and reports the other.
    target = serve.RunTarget(
        target=application, name=name, route_prefix=None, external_scaler_enabled=bool(config.scalings)
    )
    handle: Any
    (handle,) = serve.run_many([target], wait_for_applications_running=False)
    _wait_until_running(name, config.ray.ready_timeout_s)
    if not is_open:
        return Deployed("", "", gcs_address)
    address, http_address = handle.addresses.remote().result(timeout_s=_CALL_TIMEOUT_S)
    return Deployed(address, http_address, gcs_address)


def _wait_for_last_gateway(name: str, drain_s: float) -> None:
    """Wait until the gateway that another one has replaced has ended, and with it its answers."""
    give_up_s = time.monotonic() + drain_s + _CALL_TIMEOUT_S
    while time.monotonic() < give_up_s:
        states = serve.status().applications[name].deployments[GATEWAY].replica_states
        if not states.get(ReplicaState.STOPPING):
            return
        time.sleep(_POLL_S)


def _connect(ray_address: str) -> None:
    if ray.is_initialized():
        return
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # its replicas keep their own logs
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=ray_address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, RayError) as err:
        raise ClusterError(
            f"cannot join Ray at {ray_address}: {err}; if it demands a token, this user must have the same one, in "
            "~/.ray/auth_token or where RAY_AUTH_TOKEN_PATH says, and RAY_AUTH_MODE=token"
        ) from err
    except SystemExit as err:  # Ray's own handler turns SIGTERM into this
        raise KeyboardInterrupt from err
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.alarm(0)  # once Ray has seen a SIGTERM, it aborts the process three seconds later


def check_resources(config: ClusterConfig, carried: Mapping[str, float], has: str = "the Ray cluster carries") -> None:
    """Refuse a Ray cluster that lacks resources or GPUs for the replicas.

    Args:
        config: what to run.
        carried: amount of each resource in the whole cluster, or of what is free of it.
        has: which of the two, for messages.

    Raises:
        ClusterError: names the resource and the way out.
    """
    needed = Counter[str]()
    for section in config.placed.values():
        needed[section.resource] += section.num_replicas
    for resource, replicas in needed.items():
        if carried.get(resource, 0) < replicas:
            raise ClusterError(
                f"{has} {carried.get(resource, 0):g} of resource {resource!r} and needs {replicas}; "
                f"start nodes with: ray start --address=HEAD --resources='{{\"{resource}\": 1}}'"
            )

    num_gpus = sum(section.num_replicas * section.num_gpus for section in config.placed.values())
    if carried.get("GPU", 0) < num_gpus:
        raise ClusterError(
            f"{has} {carried.get('GPU', 0):g} GPUs and the replicas take {num_gpus}; start nodes "
            "on machines whose GPUs Ray finds (`ray status` lists them), or lower num_gpus or replicas"
        )


def _wait_until_running(name: str, timeout_s: float) -> None:
    give_up_s = time.monotonic() + timeout_s
    while True:
        application = serve.status().applications[name]
        if application.status == ApplicationStatus.RUNNING:
            return
        problems = "; ".join(
            f"{role}: {_reason(deployment.message)}"
            for role, deployment in application.deployments.items()
            if deployment.message
        )
        if has_failed(application):
            raise ClusterError(f"the replicas did not start: {problems or application.message}")
        if time.monotonic() > give_up_s:
            raise ClusterError(f"the replicas were not ready within ray.ready_timeout_s={timeout_s:g}: {problems}")
        time.sleep(_POLL_S)


def has_failed(application: ApplicationStatusOverview) -> bool:
    """Whether it will not come up. Serve says the same where a replica was lost meanwhile, and replaces that one."""
    if application.status not in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
        return False
    bad = (DeploymentStatus.DEPLOY_FAILED, DeploymentStatus.UNHEALTHY)
    causes = {each.status_trigger for each in application.deployments.values() if each.status in bad}
    return causes != {DeploymentStatusTrigger.HEALTH_CHECK_FAILED}


def _reason(message: str) -> str:
    """The cause in a deployment's message: the last line of a traceback, or the whole message without one."""
    return message.strip().splitlines()[-1] if "Traceback" in message else message
