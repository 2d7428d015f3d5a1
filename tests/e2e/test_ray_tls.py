"""Ray's own TLS, beside its token: who has no certificate of the cluster's authority speaks to nobody."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cluster.security.secret_files import write_secrets
from tests.e2e.conftest import run_colm
from tests.e2e.ray_nodes import RayNodes, ray_nodes
from tests.tiny import tiny_checkpoint

CHANGES_NOTHING = "/ray.rpc.NodeInfoGcsService/CheckAlive"
CALL_S = 30.0


@pytest.fixture(scope="module")
def closed_ray() -> Iterator[RayNodes]:
    with ray_nodes(demands_token=True, has_tls=True) as nodes:
        yield nodes


@pytest.mark.timeout(600)
def test_up_joins_a_ray_with_tls_to_which_nobody_speaks_without(
    closed_ray: RayNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README names the variables. Ray asks its callers for a certificate too, before it looks at a token."""
    files = {
        name: Path(path).read_bytes() for name, path in closed_ray.environment.items() if name.startswith("RAY_TLS")
    }
    shown = (("authorization", f"Bearer {Path(closed_ray.environment['RAY_AUTH_TOKEN_PATH']).read_text()}"),)
    own = [files[f"RAY_TLS_{name}"] for name in ("CA_CERT", "SERVER_KEY", "SERVER_CERT")]

    def answer(credentials: grpc.ChannelCredentials | None, metadata: tuple[tuple[str, str], ...]) -> str:
        address = closed_ray.address
        channel = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
        with channel:
            try:
                channel.unary_unary(CHANGES_NOTHING)(b"", timeout=CALL_S, metadata=metadata)
            except grpc.RpcError as err:
                return str(err.code().name)
        return "OK"

    assert answer(None, shown) == "UNAVAILABLE"
    assert answer(grpc.ssl_channel_credentials(own[0]), shown) == "UNAVAILABLE"
    assert answer(grpc.ssl_channel_credentials(*own), ()) == "UNAUTHENTICATED"
    assert answer(grpc.ssl_channel_credentials(*own), shown) == "OK"
    for name, value in closed_ray.environment.items():
        monkeypatch.setenv(name, value)
    write_secrets(tmp_path / "secrets")
    words = ("--ray-address", closed_ray.address, "--secrets", str(tmp_path / "secrets"))
    up = run_colm(
        tmp_path / "state", "up", *words, "--model", str(tiny_checkpoint(tmp_path / "tiny").path), check=False
    )
    assert "carries 0 of resource 'prefill'" in up.stderr, "it has asked all of Ray, and went on to what comes after"
