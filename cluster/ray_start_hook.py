"""What `ray start` does before it starts a node of ours: it calls what RAY_START_HOOK names."""

from typing import Any

from ray._private import ray_constants, services


def prepare(ray_params: Any, head: bool) -> None:  # noqa: ARG001
    """Leave out a server that nobody here uses, and let Ray's node know each port that Ray was told.

    The server is that of `ray://` addresses. Its port must be chosen before it starts, and where that was taken
    meanwhile it died, and `ray start --block` ended all of Ray just after it had said that Ray runs.

    `ray start` passes the port of its dashboard's agent on to the agent alone. The node waits for the agent to say it,
    and dies after 15 s.
    """
    ray_params.ray_client_server_port = None
    start, port = services.start_ray_process, ray_params.dashboard_agent_listen_port

    def start_with_port(command: list[str], process_type: str, **options: Any) -> Any:
        if process_type == ray_constants.PROCESS_TYPE_RAYLET:
            command = [*command, f"--dashboard_agent_listen_port={port}"]
        return start(command, process_type, **options)

    services.start_ray_process = start_with_port
