"""A token in a file is a token, and is shown to nobody who listens on the wire."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app
from colm.errors import ClusterError, ConfigError
from colm.node_cli import read_security
from colm.wire.members import Member
from colm.wire.security import Security, new_tls, new_token

BAD_TOKENS = {
    "empty": (b"", "is empty"),
    "a line without words": (b" \n", "is empty"),
    "two lines": (b"one\ntwo\n", "one line of printable ASCII"),
    "not ASCII": ("schlüssel".encode(), "one line of printable ASCII"),
    "not text": (b"\xff\xfe", "one line of printable ASCII"),
}


def read_token_of(path: Path) -> str | None:
    return read_security(path, None, Member.PREFILL, ["127.0.0.1"], insecure=False).token


@pytest.mark.parametrize(("content", "why"), BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
def test_a_file_without_a_token_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    """Bug: an empty file left a node open to everybody."""
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=why) as refusal:
        read_token_of(path)
    assert str(path) in str(refusal.value)


def test_an_empty_token_is_no_token() -> None:
    with pytest.raises(ValueError, match="empty"):
        Security(token="")


def test_a_token_is_read_without_the_space_around_it(tmp_path: Path) -> None:
    token = new_token()
    (tmp_path / "token").write_text(f"{token}\n")
    assert read_token_of(tmp_path / "token") == token


@contextmanager
def listening() -> Iterator[tuple[str, bytearray]]:
    """Somebody on the wire: its address, and all that it hears."""
    heard, over = bytearray(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)

        def listen() -> None:
            while not over.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.settimeout(0.1)
                    # An HTTP/2 server's settings: a client sends its headers only after them.
                    connection.sendall(bytes(3) + b"\x04" + bytes(5))
                    while not over.is_set():
                        try:
                            heard.extend(connection.recv(4096))
                        except OSError:
                            continue

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}", heard
        finally:
            over.set()
            thread.join()


def submit(tmp_path: Path, *words: str) -> Result:
    (tmp_path / "document").write_text("a document")
    return CliRunner().invoke(app, ["submit", str(tmp_path / "document"), "--timeout-s", "2", *words])


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(new_token())
    return path


def test_a_token_is_not_sent_in_clear(tmp_path: Path, token_file: Path) -> None:
    """Bug: with `--token-file` and without `--ca-file` it was."""
    with listening() as (address, heard):
        result = submit(tmp_path, "--address", address, "--token-file", str(token_file))
        assert b"Bearer" not in heard
    assert isinstance(result.exception, ClusterError)
    assert "--ca-file" in str(result.exception)
    assert not heard


def test_a_token_is_sent_in_clear_where_that_is_asked_for(tmp_path: Path, token_file: Path) -> None:
    with listening() as (address, heard):
        submit(tmp_path, "--address", address, "--token-file", str(token_file), "--plaintext")
        assert token_file.read_text().encode() in heard


def test_plaintext_and_an_authority_exclude_each_other(tmp_path: Path, token_file: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(new_tls().ca_pem)
    words = ("--address", "127.0.0.1:1", "--token-file", str(token_file), "--ca-file", str(ca_file), "--plaintext")
    assert "--plaintext" in str(submit(tmp_path, *words).exception)


@pytest.mark.parametrize(
    "words",
    [("--token-file", "FILE"), ("--ca-file", "FILE"), ("--server-name", "FILE"), ("--system-ca",), ("--plaintext",)],
)
def test_how_to_trust_a_gateway_that_is_not_named_is_refused(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Bugs: they were ignored in silence, and this machine's cluster was asked; later --server-name and --plaintext
    still were."""
    result = submit(tmp_path, *words, "--state-dir", str(tmp_path))
    assert f"{words[0]} needs --address" in str(result.exception)


def test_submit_refuses_a_file_without_a_token_too(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n")
    result = submit(tmp_path, "--address", "127.0.0.1:1", "--token-file", str(tmp_path / "token"), "--plaintext")
    assert isinstance(result.exception, ConfigError)
    assert "is empty" in str(result.exception)
