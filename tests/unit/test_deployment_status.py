"""What `colm up` makes of what Serve says while replicas start."""

import pytest
from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatusOverview

from cluster.deployment import has_failed

LOST = (DeploymentStatus.DEPLOY_FAILED, DeploymentStatusTrigger.HEALTH_CHECK_FAILED)
ILL = (DeploymentStatus.UNHEALTHY, DeploymentStatusTrigger.HEALTH_CHECK_FAILED)
BROKEN = (DeploymentStatus.DEPLOY_FAILED, DeploymentStatusTrigger.REPLICA_STARTUP_FAILED)
FINE = (DeploymentStatus.HEALTHY, DeploymentStatusTrigger.UNSPECIFIED)


def said(status: ApplicationStatus, *deployments: tuple[DeploymentStatus, DeploymentStatusTrigger]) -> bool:
    of_each = {
        str(number): DeploymentStatusOverview(status=each, status_trigger=trigger, replica_states={}, message="")
        for number, (each, trigger) in enumerate(deployments)
    }
    return has_failed(
        ApplicationStatusOverview(status=status, message="", last_deployed_time_s=0.0, deployments=of_each)
    )


@pytest.mark.parametrize("status", [ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY])
def test_a_replica_that_is_lost_while_others_start_is_no_failure(status: ApplicationStatus) -> None:
    """Bug: a change was taken back because somebody killed a replica in its middle."""
    assert not said(status, LOST, FINE)
    assert not said(status, ILL, LOST)


@pytest.mark.parametrize("deployments", [(BROKEN, FINE), (BROKEN, LOST), (FINE,), ()])
def test_a_replica_that_does_not_start_is_one_and_so_is_what_serve_gives_no_cause_for(
    deployments: tuple[tuple[DeploymentStatus, DeploymentStatusTrigger], ...],
) -> None:
    assert said(ApplicationStatus.DEPLOY_FAILED, *deployments)


@pytest.mark.parametrize("status", [ApplicationStatus.DEPLOYING, ApplicationStatus.RUNNING])
def test_nothing_has_failed_while_serve_goes_on(status: ApplicationStatus) -> None:
    assert not said(status, LOST)
