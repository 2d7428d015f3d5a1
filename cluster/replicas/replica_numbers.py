"""How many replicas Ray Serve keeps of a deployment: read, and set while it runs (ADR 51)."""

import asyncio
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from colm.errors import ClusterError

_TIMEOUT_S = 10.0


def kept_numbers(application: str) -> dict[str, int]:
    """Replicas that Serve keeps of each deployment, whether or not they run yet; none where nobody tells it. Blocks.

    Raises:
        ClusterError: Serve gives no answer.
    """
    details = _ask("get_serve_instance_details")["applications"].get(application)
    if details is None or not details["external_scaler_enabled"]:
        return {}
    return {name: found["target_num_replicas"] for name, found in details["deployments"].items()}


def tell_numbers(application: str, numbers: Mapping[str, int]) -> None:
    """Have Serve keep so many of each deployment. Blocks.

    Raises:
        ClusterError: Serve gives no answer, or the application was not run for that.
    """
    for name, number in numbers.items():
        _ask("update_deployment_replicas", DeploymentID(name=name, app_name=application), number)


class ServeReplicaNumbers:
    """Those of an application's pools, whose deployments have their names.

    Serve has this call for scalers outside of it, `POST .../scale` of its REST API; it takes it where the application
    was run with `external_scaler_enabled`.
    """

    def __init__(self, application: str) -> None:
        self._application = application

    async def now(self) -> Mapping[str, int]:
        """The numbers that Serve keeps."""
        return await asyncio.to_thread(kept_numbers, self._application)

    async def tell(self, pool: str, num_replicas: int) -> None:
        """Have Serve keep so many."""
        await asyncio.to_thread(tell_numbers, self._application, {pool: num_replicas})


def _ask(method: str, *arguments: object) -> Any:
    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        return ray.get(getattr(controller, method).remote(*arguments), timeout=_TIMEOUT_S)
    except (RayError, ValueError) as err:  # the one of the method, or no controller just now
        raise ClusterError(f"Ray Serve does not answer {method}: {err}") from err
