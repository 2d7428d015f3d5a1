"""The state that `colm up` leaves: private to the user, complete, and refused by name if damaged."""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.state import VERSION, ClusterState, Joined, make_state_dir, note_joined, read_joined, write_private
from colm.errors import ClusterError, StateVersionMismatch
from colm.wire.security import Security, Tls, new_tls

STATE = ClusterState(
    gateway_address="127.0.0.1:5",
    ray_address="127.0.0.1:6379",
    ray_pid=4242,
    client_token="secret-token",
    ca_file="/secrets/ca.pem",
)
PLAIN = replace(STATE, ray_pid=None, client_token=None, ca_file=None)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("state", [STATE, PLAIN], ids=["secured", "plain"])
def test_state_is_read_back_as_written(tmp_path: Path, state: ClusterState) -> None:
    state.write(tmp_path / "state")
    assert ClusterState.read(tmp_path / "state") == state


def test_state_is_for_this_user_alone(tmp_path: Path) -> None:
    old_mask = os.umask(0)
    try:
        STATE.write(tmp_path / "state")
    finally:
        os.umask(old_mask)
    assert mode_of(tmp_path / "state") == 0o700
    assert mode_of(tmp_path / "state" / "cluster.json") == 0o600


def test_an_older_file_that_others_could_read_is_replaced_by_one_they_cannot(tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text("{}")
    (tmp_path / "cluster.json").chmod(0o644)
    STATE.write(tmp_path)
    assert mode_of(tmp_path / "cluster.json") == 0o600


def test_a_leftover_that_others_can_read_does_not_lend_its_mode(tmp_path: Path) -> None:
    """Bug: opening an existing file keeps its mode, so the secret went into a readable one."""
    (tmp_path / "token.new").write_text("")
    (tmp_path / "token.new").chmod(0o644)
    write_private(tmp_path / "token", "secret")
    assert mode_of(tmp_path / "token") == 0o600


def test_a_secret_is_not_written_through_a_planted_link(tmp_path: Path) -> None:
    """Bug: it was, into a file of the planter's."""
    theirs = tmp_path / "theirs"
    theirs.write_text("before")
    (tmp_path / "token.new").symlink_to(theirs)
    (tmp_path / "token").symlink_to(theirs)
    write_private(tmp_path / "token", "secret")
    assert theirs.read_text() == "before"
    assert not (tmp_path / "token").is_symlink()
    assert (tmp_path / "token").read_text() == "secret"


def test_a_directory_into_which_others_may_write_is_refused(tmp_path: Path) -> None:
    """Bug: whoever planted links in it had logs and locks written to where they led."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(ClusterError, match=r"others may write into .*chmod it to 700"):
        make_state_dir(shared)
    shared.chmod(0o755)
    make_state_dir(shared)


def test_of_a_joined_ray_it_is_known_which_application_there_is_ours(tmp_path: Path) -> None:
    """Bug: `down` behind a killed `up` took the application of whoever else had joined that Ray."""
    assert read_joined(tmp_path) is None
    note_joined(tmp_path, Joined("10.0.0.1:6379", "other"))
    assert read_joined(tmp_path) == Joined("10.0.0.1:6379", "other")
    assert replace(STATE, options={"ray": {"application": "other"}}).cluster == "other"


def test_writing_leaves_no_partial_file(tmp_path: Path) -> None:
    STATE.write(tmp_path)
    STATE.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cluster.json"]
    ClusterState.forget(tmp_path)
    assert not list(tmp_path.iterdir())


def test_clients_get_the_token_and_the_authorities_of_now_and_no_key(tmp_path: Path) -> None:
    state = replace(STATE, ca_file=str(tmp_path / "ca.pem"))
    for _ in range(2):
        (tmp_path / "ca.pem").write_bytes(pem := new_tls().ca_pem)
        assert state.security == Security(token="secret-token", tls=Tls(ca_pem=pem))
    assert PLAIN.security == Security()


def test_without_a_file_no_cluster_is_known(tmp_path: Path) -> None:
    assert ClusterState.read(tmp_path) is None
    with pytest.raises(ClusterError, match="run `colm up --model DIR` first"):
        ClusterState.require(tmp_path)


def test_a_forgotten_cluster_is_not_known(tmp_path: Path) -> None:
    STATE.write(tmp_path)
    ClusterState.forget(tmp_path)
    ClusterState.forget(tmp_path)
    assert ClusterState.read(tmp_path) is None


WHOLE: dict[str, Any] = {"version": VERSION} | {name: getattr(STATE, name) for name in STATE.__slots__}
DAMAGES = {
    "empty": b"",
    "cut": json.dumps(WHOLE).encode()[:40],
    "not text": b"\xff\xfe",
    "not an object": b"[]",
    "a field missing": json.dumps({key: WHOLE[key] for key in list(WHOLE) if key != "ray_pid"}).encode(),
    "a field too many": json.dumps(WHOLE | {"colour": "red"}).encode(),
}


@pytest.mark.parametrize("data", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_named_with_the_way_out(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "cluster.json").write_bytes(data)
    with pytest.raises(ClusterError, match=r"cluster\.json is damaged .*remove it and run `colm up` again"):
        ClusterState.read(tmp_path)


FIELDS = (
    "gateway_address",
    "http_address",
    "ray_address",
    "ray_pid",
    "client_token",
    "ca_file",
    "own_certificate",
    "options",
    "application",
    "weights_stamps",
)


def test_a_version_stands_for_these_fields() -> None:
    """Who changes this list changes `VERSION`, too: a build that reads the file knows no others."""
    assert (VERSION, tuple(STATE.__slots__)) == (1, FIELDS)


@pytest.mark.parametrize("version", [None, 0, VERSION + 1, "x"])
def test_a_file_of_another_version_says_so_and_the_way_out(tmp_path: Path, version: object) -> None:
    """Bug: it was called damaged, and `colm up` was to be run again, beside the cluster that ran."""
    body = {name: value for name, value in WHOLE.items() if name not in ("version", "weights_stamps")}
    body |= {} if version is None else {"version": version}
    (tmp_path / "cluster.json").write_text(json.dumps(body))
    for read in (ClusterState.read, ClusterState.require):
        with pytest.raises(StateVersionMismatch, match=r"another version of colm-serve.*run `colm down` with that one"):
            read(tmp_path)


def test_a_state_shows_no_token_when_printed() -> None:
    """Bug: the dataclass's own repr put the token into logs and traces."""
    assert "secret-token" not in repr(STATE)
