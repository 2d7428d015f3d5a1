"""A Ray that is joined must demand its token of everybody, or `colm up` says what that means."""

from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from cluster.ray_guard import check_token_mode
from cluster.security.secret_files import write_secrets
from cluster.state import read_joined
from colm.errors import ClusterError
from tests.e2e.conftest import run_colm
from tests.e2e.ray_nodes import RayNodes, ray_nodes
from tests.tiny import tiny_checkpoint

Up = Callable[..., "CompletedProcess[str]"]


@pytest.fixture(scope="module")
def open_ray() -> Iterator[RayNodes]:
    with ray_nodes(demands_token=False) as nodes:
        yield nodes


@pytest.fixture
def up(tmp_path: Path, open_ray: RayNodes, monkeypatch: pytest.MonkeyPatch) -> Up:
    write_secrets(tmp_path / "secrets")
    words = ("up", "--ray-address", open_ray.address, "--secrets", str(tmp_path / "secrets"))
    words += ("--model", str(tiny_checkpoint(tmp_path / "tiny").path))

    def run(mode: str, *more: str) -> "CompletedProcess[str]":
        for name, value in (open_ray.environment | {"RAY_AUTH_MODE": mode}).items():
            monkeypatch.setenv(name, value)
        return run_colm(tmp_path / "state", *words, *more, check=False)

    return run


@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_up_does_not_join_a_ray_that_answers_without_a_token(
    open_ray: RayNodes, up: Up, tmp_path: Path, mode: str
) -> None:
    """Bug: it joined every Ray, whatever this process's own environment said about tokens."""
    refused = up(mode)
    (error,) = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert refused.returncode == 1
    assert f"Ray at {open_ray.address} answers without a token" in error
    assert "ray get-auth-token --generate" in error
    assert read_joined(tmp_path / "state") is None


def test_the_flag_that_lets_it_join_says_insecure(up: Up) -> None:
    joined = up("disabled", "--insecure-ray")
    assert "insecure: whoever reaches the ports of this Ray can run code on its machines" in joined.stderr
    assert "carries 0 of resource 'prefill'" in joined.stderr, "it went on to what comes after"


def test_a_ray_that_cannot_be_asked_is_not_taken_for_a_closed_one() -> None:
    with pytest.raises(ClusterError, match="cannot be asked whether it demands a token"):
        check_token_mode("127.0.0.1:1", [])
