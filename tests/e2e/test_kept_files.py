"""Files of /v1/files on a cluster whose gateway changes, is killed, and ends."""

import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai import DefaultHttpxClient, OpenAI

from cluster.state import ClusterState
from tests.e2e.conftest import RunningCluster, run_colm, until
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.timeout(1800)  # it has three `colm up`, a gateway that is killed and a `colm down` in it
TEXT = "a long document. " * 8


def options(folder: Path, max_requests: int, more: str = "") -> tuple[str, str]:
    path = folder / f"{max_requests}.toml"
    path.write_text(
        f'[model]\ndtype = "float32"\npath = "{folder / "tiny"}"\n'
        f'[gateway]\nport = 0\nmax_requests = {max_requests}\n{more}[decode]\nkv_cache_bytes = "64MiB"\n'
    )
    return "--config", str(path)


def gateways(cluster: RunningCluster) -> list[psutil.Process]:
    """Those that are there, one that ends among them."""
    found = []
    for process in psutil.Process(cluster.state.ray_pid).children(recursive=True):
        with suppress(psutil.Error):  # it ends at this moment
            if "ServeReplica:colm:gateway" in " ".join(process.cmdline()):
                found.append(process)
    return found


def the_gateway(cluster: RunningCluster) -> psutil.Process:
    until(lambda: len(gateways(cluster)) == 1, 120)
    return gateways(cluster)[0]


def kept(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("file-*") if path.is_file()]


def test_a_document_outlives_its_gateway_and_ends_with_the_cluster(tmp_path: Path) -> None:
    """Bug: it was lost when an option of the gateway changed, and when the gateway was killed."""
    tiny_checkpoint(tmp_path / "tiny", tokenizer=True)
    state_dir = tmp_path / "state"
    run_colm(state_dir, "up", *options(tmp_path, 64))
    try:
        cluster = RunningCluster(state_dir, state := ClusterState.require(state_dir))
        session = (state_dir / "ray").resolve() / "session_latest" / "files-colm"
        assert session.stat().st_mode & 0o777 == 0o700
        http = DefaultHttpxClient(verify=ssl.create_default_context(cafile=state.ca_file))
        # It tries again while no gateway is there.
        with OpenAI(base_url=state.base_url, api_key=state.client_token, http_client=http, max_retries=12) as client:

            def ask() -> str:
                extra: Any = {"document": book.id, "ignore_eos": True}
                answer = client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": "what is it about?"}],
                    max_tokens=6,
                    temperature=0,
                    extra_body=extra,
                )
                return answer.choices[0].message.content or ""

            book = client.files.create(file=("book.txt", TEXT.encode()), purpose="user_data")
            said = ask()
            before = the_gateway(cluster)
            cluster.colm("up", *options(tmp_path, 63))
            until(lambda: before not in gateways(cluster), 120)
            assert ask() == said
            (killed := the_gateway(cluster)).kill()
            until(lambda: killed not in gateways(cluster), 120)
            assert ask() == said
            assert client.files.content(book.id).text == TEXT
            (found,) = kept(session)
            assert found.name == f"{book.id}.operator"
            assert found.stat().st_mode & 0o777 == 0o600
            # A folder of one's own is another place, and stays.
            own, last = tmp_path / "own", the_gateway(cluster)
            cluster.colm("up", *options(tmp_path, 62, f'files_folder = "{own}"\n'))
            until(lambda: last not in gateways(cluster), 120)
            client.files.create(file=("book.txt", TEXT.encode()), purpose="user_data")
            with pytest.raises(openai.BadRequestError, match="no file of yours"):
                client.files.retrieve(book.id)
            assert len(kept(own)) == 1
    finally:
        run_colm(state_dir, "down")
    assert len(kept(own)) == 1
    assert not kept(state_dir)
    assert not session.exists()
