"""Secrets lie in files of every machine, closed to others; what Ray keeps only names them."""

import re
import stat
from pathlib import Path

import pytest
from ray import cloudpickle

from cluster.application import build
from cluster.options import load_config
from cluster.security.secret_files import SecretFiles, write_secrets
from colm.errors import ClusterError, ConfigError
from colm.wire.members import Member
from tests.secret_folder import secret_files

SECRETS = ("client_token", "node_token", "ca_key.pem", *(f"{member.value}.pem" for member in Member))
READ = ("client_token", "node_token", "public.pem", "decode.pem")


def test_what_ray_keeps_of_the_application_holds_no_secret(tmp_path: Path) -> None:
    """Bug: the TLS key and both tokens lay in Ray's key-value store, within the serialised application."""
    secrets = secret_files(tmp_path)
    kept = cloudpickle.dumps(build(load_config(None, {}), tmp_path, secrets))
    assert secrets.folder.encode() in kept
    assert b"PRIVATE KEY" not in kept
    for name in SECRETS:
        assert (tmp_path / "secrets" / name).read_bytes()[:40] not in kept


def test_the_files_are_for_this_user_alone(tmp_path: Path) -> None:
    secret_files(tmp_path)
    folder = tmp_path / "secrets"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_a_folder_that_is_there_is_not_written_into(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="name a folder that is not there yet"):
        write_secrets(tmp_path)


def test_clients_and_nodes_have_tokens_of_their_own_and_every_member_a_key(tmp_path: Path) -> None:
    secrets = secret_files(tmp_path)
    clients, nodes = secrets.of_clients(), [secrets.of_nodes(member) for member in Member]
    assert clients.token
    assert len({node.token for node in nodes}) == 1
    assert nodes[0].token
    assert clients.token != nodes[0].token
    assert len({node.current_tls and node.current_tls.key_pem for node in nodes}) == len(Member)


def test_what_is_switched_off_is_not_read_but_nodes_always_have_a_token(tmp_path: Path) -> None:
    folder = secret_files(tmp_path).folder
    for path in Path(folder).iterdir():
        if path.name != "node_token":
            path.unlink()
    secrets = SecretFiles(folder=folder, has_tls=False, has_client_token=False)
    assert (secrets.of_clients().token, secrets.of_clients().tls) == (None, None)
    assert secrets.of_nodes(Member.DECODE).token


@pytest.mark.parametrize("name", READ)
def test_a_secret_that_is_missing_empty_or_open_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """An empty token would leave a server open."""
    secrets = secret_files(tmp_path)
    path = tmp_path / "secrets" / name

    def refusal() -> str:
        with pytest.raises((ClusterError, ConfigError)) as refused:
            [secrets.of_clients(), secrets.of_nodes(Member.DECODE)]
        return str(refused.value)

    path.chmod(0o644)
    assert re.fullmatch(rf"others may read (the key in )?{path} \(mode 644\); chmod it to 600", refusal())
    path.chmod(0o600)
    path.write_text("\n")
    assert re.match(rf"{path} (is empty|holds no certificate)", refusal())
    path.unlink()
    assert f"cannot read {path}: No such file" in refusal()


def test_a_ray_that_is_joined_needs_a_folder_and_one_of_our_own_takes_none() -> None:
    with pytest.raises(ConfigError, match=r"ray.address='auto' needs security.folder: make .* `colm secrets DIR`"):
        load_config(None, {"ray.address": "auto"})
    with pytest.raises(ConfigError, match=r"security.folder='x' needs ray.address"):
        load_config(None, {"security.folder": "x"})
