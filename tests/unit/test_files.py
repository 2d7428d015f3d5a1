"""Documents of /v1/files: what gateways that share a folder keep, count, hand out and forget."""

import asyncio
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.client_tokens import Client, TokenLimits
from cluster.openai import files
from cluster.openai.files import MAX_FILES, FileStore
from cluster.openai.stored_file import HEAD_BYTES
from colm.errors import CapacityExceeded, ClusterError, GoingAway, InvalidRequest
from tests.gates import gate_before

_T = TypeVar("_T")

MAX_BYTES = 100
ALICE, BOB = (
    Client(name=name, sha256="", limits=TokenLimits(max_files_bytes=limit))
    for name, limit in (("alice", None), ("alice.b", 60))
)


def store_of(folder: Path, max_bytes: int = MAX_BYTES, **options: Any) -> FileStore:
    return FileStore(folder, max_bytes=max_bytes, max_document_bytes=80, **options)


async def add(store: FileStore, content: bytes = b"text", owner: Client = ALICE) -> str:
    return (await store.add(owner=owner, filename="book.txt", purpose="user_data", content=content)).id


def the_file(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if path.name.startswith("file-"))
    return found


@dataclass
class Known:
    owner: Client
    content: bytes
    is_damaged: bool = False


class SeveralGateways(RuleBasedStateMachine):
    """Two gateways that overlap, either of which may be replaced, against a dictionary."""

    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.ticks = count()
        self.stores = [self.store(), self.store()]
        self.known: dict[str, Known] = {}

    def store(self) -> FileStore:
        return store_of(
            Path(self.folder.name), now=lambda: datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=next(self.ticks))
        )

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.close()
            self.folder.cleanup()

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    def bytes_of(self, *owners: Client) -> int:
        return sum(len(each.content) for each in self.known.values() if each.owner in owners)

    @rule(at=st.sampled_from([0, 1]), owner=st.sampled_from([ALICE, BOB]), content=st.binary(max_size=90))
    def add(self, at: int, owner: Client, content: bytes) -> None:
        content = content.hex().encode()[: len(content)]
        fits = self.bytes_of(ALICE, BOB) + len(content) <= MAX_BYTES
        limit = owner.limits.max_files_bytes or MAX_BYTES
        if len(content) > 80 or (fits and len(content) > limit):
            with pytest.raises(InvalidRequest):
                self.run(add(self.stores[at], content, owner))
        elif not fits or self.bytes_of(owner) + len(content) > limit:
            with pytest.raises(CapacityExceeded, match="delete some"):
                self.run(add(self.stores[at], content, owner))
        else:
            self.known[self.run(add(self.stores[at], content, owner))] = Known(owner, content)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), at=st.sampled_from([0, 1]))
    def read(self, data: st.DataObject, at: int) -> None:
        file_id = data.draw(st.sampled_from(list(self.known)))
        known, store = self.known[file_id], self.stores[at]
        if known.is_damaged:
            with pytest.raises(InvalidRequest, match=f"{file_id}.*is damaged"):
                self.run(store.content(file_id, known.owner))
        else:
            assert self.run(store.content(file_id, known.owner)) == known.content
            assert self.run(store.get(file_id, known.owner)).num_bytes == len(known.content)
        stranger = BOB if known.owner is ALICE else ALICE
        for ask in (store.content, store.get, store.delete):
            with pytest.raises(InvalidRequest, match="no file of yours"):
                self.run(ask(file_id, stranger))

    @precondition(lambda self: self.known)
    @rule(data=st.data(), at=st.sampled_from([0, 1]))
    def delete(self, data: st.DataObject, at: int) -> None:
        file_id = data.draw(st.sampled_from(list(self.known)))
        owner = self.known.pop(file_id).owner
        self.run(self.stores[at].delete(file_id, owner))
        for ask in (self.stores[0].content, self.stores[1].content, self.stores[at].delete):
            with pytest.raises(InvalidRequest, match="no file of yours"):
                self.run(ask(file_id, owner))

    @precondition(lambda self: self.known)
    @rule(data=st.data(), add_one=st.booleans())
    def damage(self, data: st.DataObject, add_one: bool) -> None:
        file_id = data.draw(st.sampled_from(list(self.known)))
        (path,) = Path(self.folder.name).glob(f"{file_id}.*")
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(HEAD_BYTES, len(content))) if len(content) > HEAD_BYTES else 0
        if add_one and not self.known[file_id].is_damaged and self.bytes_of(ALICE, BOB) < MAX_BYTES:
            content.append(0)
            self.known[file_id].content += b"\0"
        else:
            content[min(at, len(content) - 1)] ^= 1 << 4
            if self.known[file_id].is_damaged:  # twice may be none
                return
        path.write_bytes(content)
        self.known[file_id].is_damaged = True

    @rule(at=st.sampled_from([0, 1]))
    def replace(self, at: int) -> None:
        self.stores[at] = self.store()

    @invariant()
    def all_list_the_same(self) -> None:
        if not hasattr(self, "stores"):
            return
        assert self.bytes_of(ALICE, BOB) <= MAX_BYTES
        for store in self.stores:
            for owner in (ALICE, BOB):
                listed = [file.id for file in self.run(store.of(owner))]
                whole = [each for each in listed if not self.known[each].is_damaged]
                assert sorted(listed) == sorted(name for name, each in self.known.items() if each.owner is owner)
                assert whole == [name for name in self.known if name in whole], "oldest first"


TestSeveralGateways = SeveralGateways.TestCase
TestSeveralGateways.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)

_KILLED = """
import asyncio, os, sys
from pathlib import Path
from cluster.client_tokens import Client
from cluster.openai.files import FileStore

def add_and_be_killed(folder, steps):
    def killed_at(name):
        def call(*words, **options):
            nonlocal steps
            steps -= 1
            if steps < 0:
                os._exit(9)
            return real(*words, **options)
        real = getattr(os, name)
        setattr(os, name, call)

    store = FileStore(Path(folder), max_bytes=100, max_document_bytes=80)
    owner = Client(name="alice", sha256="")
    for name in ("open", "fdopen", "listdir", "fsync", "rename", "unlink", "close"):
        killed_at(name)
    asyncio.run(store.add(owner=owner, filename="", purpose="user_data", content=b"x" * 70))
    os._exit(0)

for steps in range(20):
    if not (child := os.fork()):
        add_and_be_killed(f"{sys.argv[1]}/{steps}", steps)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code)
    if not code:
        break
"""


async def test_a_gateway_that_is_killed_as_it_writes_leaves_a_whole_file_or_none(tmp_path: Path) -> None:
    """At each of its calls to the system."""
    children = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path)], check=True, timeout=240, stdout=subprocess.PIPE, text=True
    )
    outcomes = []
    for step, code in enumerate(children.stdout.split()):
        store = store_of(folder := tmp_path / str(step))
        kept = await store.of(ALICE)
        for file in kept:
            assert await store.content(file.id, ALICE) == b"x" * 70
        await add(store, b"y" * (30 if kept else 80))  # a half file takes no room, and goes when the next one comes
        assert {path.suffix for path in folder.iterdir()} == {".alice", ""}, "the files and the lock"
        outcomes.append((int(code), len(kept)))
    assert outcomes[0] == (9, 0)
    assert (9, 1) in outcomes, "killed behind the rename"
    assert outcomes[-1] == (0, 1)
    assert len(outcomes) > 5


async def test_only_this_user_may_read_what_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "files"
    await add(store_of(folder))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_a_folder_that_others_may_enter_or_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(ClusterError, match=f"cannot keep files in .*{name}: .*gateway.files_folder"):
            store_of(tmp_path / name)
    folder.chmod(0o750)
    with pytest.raises(ClusterError, match=r"others may enter .*files \(mode 750\); make it yours"):
        store_of(folder)


async def test_a_folder_that_is_moved_away_is_not_replaced_by_another_one(tmp_path: Path) -> None:
    """In a joined Ray's session folder others may move it."""
    store = store_of(tmp_path / "files")
    (tmp_path / "files").rename(tmp_path / "away")
    (tmp_path / "files").mkdir(mode=0o777)
    file_id = await add(store)
    assert list((tmp_path / "files").iterdir()) == []
    assert await store.content(file_id, ALICE) == b"text"


@pytest.mark.parametrize("at", [0, 70, HEAD_BYTES - 1, HEAD_BYTES, HEAD_BYTES + 3])
async def test_a_damaged_file_is_refused_listed_and_deleted(tmp_path: Path, at: int) -> None:
    store = store_of(tmp_path / "files")
    file_id, other = await add(store), await add(store, b"more", BOB)
    (path,) = (tmp_path / "files").glob(f"{file_id}.*")
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=f"document='{file_id}': is damaged .* upload it again"):
        await store.content(file_id, ALICE)
    (listed,) = await store.of(ALICE)
    assert (listed.as_json()["status"], listed.num_bytes) == ("error" if at < HEAD_BYTES else "processed", 4)
    await store.delete(file_id, ALICE)
    assert await store.of(ALICE) == []
    assert await store.content(other, BOB) == b"more"


async def test_a_name_of_256_characters_is_kept_whatever_they_are(tmp_path: Path) -> None:
    store, name = store_of(tmp_path / "files"), "\U0001f4d6" * 300
    file = await store.add(owner=ALICE, filename=name, purpose="user_data", content=b"")
    assert (await store_of(tmp_path / "files").get(file.id, ALICE)).filename == name[:256]


@pytest.mark.parametrize("file_id", ["", "file-", "../cluster.json", f"file-{'0' * 32}/..", f"file-{'0' * 32}.alice"])
async def test_an_id_names_nothing_but_a_file_of_the_folder(tmp_path: Path, file_id: str) -> None:
    store = store_of(tmp_path / "files")
    await add(store)
    for ask in (store.content, store.get, store.delete):
        with pytest.raises(InvalidRequest, match="no file of yours"):
            await ask(file_id, ALICE)
    assert the_file(tmp_path / "files").stat().st_size == HEAD_BYTES + 4


async def test_uploads_at_two_gateways_at_once_do_not_pass_the_limit_together(tmp_path: Path) -> None:
    stores = [store_of(tmp_path / "files") for _ in range(2)]
    done = await asyncio.gather(*(add(stores[number % 2], b"x" * 30) for number in range(12)), return_exceptions=True)
    assert sum(isinstance(each, str) for each in done) == 3
    assert {type(each) for each in done} == {str, CapacityExceeded}


@pytest.mark.parametrize("ends", ["by its client", "by the limit"])
async def test_an_upload_of_which_nobody_hears_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """Bug: where its turn came later it was kept, under an id that nobody knew, and counted."""
    with gate_before(FileStore, "_require_room") as gate:
        store = store_of(tmp_path)
        if ends == "by the limit":
            monkeypatch.setattr(files, "_WAIT_S", 0.0)
        adding = [asyncio.create_task(add(store)) for _ in range(2)]
        if ends == "by its client":
            await gate.until_reached()
            for each in adding:
                each.cancel()
        results = await asyncio.gather(*adding, return_exceptions=True)
        gate.open()
    expected = asyncio.CancelledError if ends == "by its client" else CapacityExceeded
    assert [type(each) for each in results] == [expected] * 2
    monkeypatch.undo()
    kept = await add(store)
    assert [each.id for each in await store.of(ALICE)] == [kept]


async def test_those_who_list_at_once_each_see_all(tmp_path: Path) -> None:
    store = store_of(tmp_path / "files")
    for _ in range(100):
        await add(store, b"")
    async with asyncio.TaskGroup() as group:
        lists = [group.create_task(store.of(ALICE)) for _ in range(40)]
    assert {len(each.result()) for each in lists} == {100}


async def test_deletes_at_two_gateways_at_once_have_one_winner(tmp_path: Path) -> None:
    stores = [store_of(tmp_path / "files") for _ in range(2)]
    file_id = await add(stores[0])
    done = await asyncio.gather(*(store.delete(file_id, ALICE) for store in stores), return_exceptions=True)
    assert sorted(type(each).__name__ for each in done) == ["InvalidRequest", "NoneType"]


async def test_the_number_of_files_is_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_FILES == 1000
    monkeypatch.setattr("cluster.openai.files.MAX_FILES", 2)
    store = store_of(tmp_path / "files")
    ids = [await add(store, b"") for _ in range(2)]
    with pytest.raises(CapacityExceeded, match="2 files of 0 bytes are kept"):
        await add(store, b"")
    await store.delete(ids[0], ALICE)
    await add(store, b"")


async def test_when_the_cluster_ends_nothing_is_left_but_what_somebody_else_put_there(tmp_path: Path) -> None:
    store = store_of(tmp_path / "files")
    await add(store)
    (tmp_path / "files" / "file-0.partial").touch()
    await store.forget_all()
    assert not (tmp_path / "files").exists()
    with pytest.raises(GoingAway):
        await add(store)
    store = store_of(tmp_path / "files")
    (tmp_path / "files" / "notes").touch()
    await add(store)
    await store.forget_all()
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["notes"]


@pytest.mark.parametrize(
    ("code", "kind"), [(28, CapacityExceeded), (122, CapacityExceeded), (5, ClusterError), (30, ClusterError)]
)
async def test_a_disk_that_fails_is_a_typed_error_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    store = store_of(tmp_path / "files")

    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(kind, match=f"files cannot be kept by the gateway: {os.strerror(code)}"):
            await add(store)
    assert [path.name for path in (tmp_path / "files").iterdir()] == [".lock"]
    await add(store)
