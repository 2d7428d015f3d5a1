"""The names by which Ray Serve knows a cluster's applications, and the gateway in each."""

GATEWAY = "gateway"
"""The gateway's deployment; those of the pools are called by `colm.nodes.pool_name`."""


def names_of(cluster: str) -> tuple[str, str]:
    """The two names that a cluster's application may have: a model takes another one's place in the other (ADR 55).

    Args:
        cluster: `ray.application`.
    """
    return cluster, f"{cluster}-successor"
