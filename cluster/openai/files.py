"""Documents that clients upload once and ask about many times, in a folder that the next gateway finds (ADR 63).

Each document is one file, which appears whole or not at all. Its name says whose it is. Nothing is kept in memory, so
gateways that overlap see the same documents, and count the same bytes.
"""

import asyncio
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from cluster.client_tokens import Client
from cluster.openai.stored_file import HEAD_BYTES, MAX_NAME_CHARS, Damaged, StoredFile, damaged, head_of, parse_head
from colm.clock import utc_now
from colm.errors import CapacityExceeded, ClusterError, ColmError, GoingAway, InvalidRequest

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

MAX_FILES = 1000
"""Of all clients."""
_ID = re.compile(r"file-[0-9a-f]{32}")
_OWNED = re.compile(rf"({_ID.pattern})\.(.+)")
"""Names of files: a document's id, and its client's name."""
_PARTIAL = ".partial"
_LOCK = ".lock"
_WAIT_S = 60.0
"""Longest wait for another upload, of this gateway or of one that it overlaps."""


class FileStore:
    """Keeps documents until they are deleted. Several may share a folder. Lives on one event loop.

    Args:
        folder: where; made for this user alone if it is not there.
        max_bytes: of all documents.
        max_document_bytes: of one.
        now: the time.

    Raises:
        ClusterError: the folder cannot be used, or others may enter it.
    """

    def __init__(
        self, folder: Path, *, max_bytes: int, max_document_bytes: int, now: Callable[[], datetime] = utc_now
    ) -> None:
        self._path = folder
        # From here on by its descriptor: whoever moves the folder away puts no other one in its place.
        self._folder = _open(folder)
        self._max_bytes = max_bytes
        self._max_document_bytes = max_document_bytes
        self._now = now
        self._is_over = False
        # One thread writes, so that uploads of this gateway wait for their turn without one each.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="files")

    async def add(self, *, owner: Client, filename: str, purpose: str, content: bytes) -> StoredFile:
        """Keep a document.

        Raises:
            InvalidRequest: it is too large, or not UTF-8.
            CapacityExceeded: there is no room, of all clients or of this one; a file must be deleted first.
            GoingAway: the cluster stops.
            ClusterError: the folder has failed.
        """
        if len(content) > (limit := self._max_document_bytes):
            raise InvalidRequest("file", f"{len(content)} bytes", f"at most {limit} bytes")
        file = StoredFile(
            id=f"file-{secrets.token_hex(16)}",
            filename=filename[:MAX_NAME_CHARS],
            purpose=purpose,
            created_s=self._now().timestamp(),
            num_bytes=len(content),
        )
        keeping = self._writer.submit(self._keep, owner, file, content)
        try:
            async with asyncio.timeout(_WAIT_S):
                await asyncio.wrap_future(keeping)
        except TimeoutError as err:
            self._take_back(keeping, file, owner)
            raise CapacityExceeded("other files are being kept, and this one waited too long; try again later") from err
        except asyncio.CancelledError:
            self._take_back(keeping, file, owner)
            raise
        return file

    def _take_back(self, keeping: "Future[None]", file: StoredFile, owner: Client) -> None:
        """Leave nothing of an upload of which nobody hears: its turn may come, or have come, all the same."""

        def forget(done: "Future[None]") -> None:
            if not done.cancelled() and done.exception() is None:
                self._remove(_name(file.id, owner.name))

        keeping.add_done_callback(forget)

    async def of(self, owner: Client) -> list[StoredFile]:
        """A client's files, oldest first; those that are damaged too, so that they can be deleted."""
        return await asyncio.to_thread(self._list, owner.name)

    async def get(self, file_id: str, owner: Client) -> StoredFile:
        """A client's file.

        Raises:
            InvalidRequest: there is none of that id, it is somebody else's, or it is damaged.
        """
        return (await asyncio.to_thread(self._read, file_id, owner.name, with_text=False))[0]

    async def content(self, file_id: str, owner: Client) -> bytes:
        """The text of a client's file, whose digest was looked at.

        Raises:
            InvalidRequest: as `get`.
        """
        return (await asyncio.to_thread(self._read, file_id, owner.name, with_text=True))[1]

    async def delete(self, file_id: str, owner: Client) -> None:
        """Forget a client's file, damaged or not; requests that read it already keep their copy.

        Raises:
            InvalidRequest: there is none of that id, or it is somebody else's.
        """
        await asyncio.to_thread(self._delete, file_id, owner.name)

    async def forget_all(self) -> None:
        """Delete every document, and keep none from now on; call it when the cluster ends."""
        await self._in_turn(self._end)

    async def _in_turn(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, work)

    def _keep(self, owner: Client, file: StoredFile, content: bytes) -> None:
        try:
            content.decode()
        except UnicodeDecodeError as err:
            raise InvalidRequest("file", file.filename, f"must be UTF-8 text; byte {err.start} breaks it") from err
        head = head_of(file, content)
        if self._is_over:
            raise GoingAway("the gateway is stopping and keeps no more files")
        with _failing("kept"), self._alone():
            self._require_room(owner, len(content))
            partial = file.id + _PARTIAL
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            try:
                with os.fdopen(os.open(partial, flags, 0o600, dir_fd=self._folder), "wb") as opened:
                    opened.write(head)
                    opened.write(content)
                    opened.flush()
                    os.fsync(opened.fileno())
                name = _name(file.id, owner.name)
                os.rename(partial, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            except OSError:
                with suppress(OSError):
                    os.unlink(partial, dir_fd=self._folder)
                raise
            os.fsync(self._folder)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Only one gateway counts and writes at a time; the system gives back the lock of one that is killed."""
        lock = os.open(_LOCK, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=self._folder)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _require_room(self, owner: Client, num_more: int) -> None:
        num_files = num_bytes = num_own = 0
        for name in self._names():
            if name.endswith(_PARTIAL):  # of a gateway that was killed: whoever writes holds the lock
                self._remove(name)
            elif found := _OWNED.fullmatch(name):
                with suppress(FileNotFoundError):  # deleted meanwhile
                    size = max(0, os.stat(name, dir_fd=self._folder, follow_symlinks=False).st_size - HEAD_BYTES)
                    num_files += 1
                    num_bytes += size
                    num_own += size if found[2] == owner.name else 0
        if num_bytes + num_more > self._max_bytes or num_files >= MAX_FILES:
            raise CapacityExceeded(
                f"{num_files} files of {num_bytes} bytes are kept, and this one would not fit into "
                f"gateway.max_files_bytes={self._max_bytes}; delete some"
            )
        if (limit := owner.limits.max_files_bytes) is None:
            return
        if num_more > limit:
            raise InvalidRequest("file", f"{num_more} bytes", f"this client may keep {limit} bytes")
        if num_own + num_more > limit:
            raise CapacityExceeded(
                f"client {owner.name!r} may keep {limit} bytes of files, and keeps {num_own}; delete some",
                client_limit="max_files_bytes",
            )

    def _list(self, owner: str) -> list[StoredFile]:
        files = []
        with _failing("listed"):
            for name in self._names():
                if (found := _OWNED.fullmatch(name)) is None or found[2] != owner:
                    continue
                with suppress(FileNotFoundError), self._opened(name) as opened:
                    try:
                        files.append(parse_head(found[1], opened.read(HEAD_BYTES))[0])
                    except Damaged:
                        files.append(damaged(found[1], os.fstat(opened.fileno())))
        return sorted(files, key=lambda file: (file.created_s, file.id))

    def _read(self, file_id: str, owner: str, *, with_text: bool) -> tuple[StoredFile, bytes]:
        try:
            with _failing("read"), _missing(file_id), self._opened(_name(file_id, owner)) as opened:
                file, digest = parse_head(file_id, opened.read(HEAD_BYTES))
                if not with_text:
                    return file, b""
                # A byte more than there should be shows that something was added.
                content = opened.read(file.num_bytes + 1)
            if len(content) != file.num_bytes or hashlib.sha256(content).hexdigest() != digest:
                raise Damaged
        except Damaged as err:
            logger.error("files.damaged file=%s folder=%s", file_id, self._path)
            raise InvalidRequest(
                "document", file_id, "is damaged where the gateway keeps it; delete it and upload it again"
            ) from err
        return file, content

    def _delete(self, file_id: str, owner: str) -> None:
        with _failing("deleted"), _missing(file_id):
            os.unlink(_name(file_id, owner), dir_fd=self._folder)

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._folder), "rb") as opened:
            yield opened

    def _end(self) -> None:
        self._is_over = True
        for name in self._names():
            if name == _LOCK or name.endswith(_PARTIAL) or _OWNED.fullmatch(name):
                self._remove(name)
        with suppress(OSError):  # something else is in it
            self._path.rmdir()

    def _names(self) -> list[str]:
        # By a descriptor of its own: those of one opening have one place in the folder, which two threads would share.
        opened = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._folder)
        try:
            return os.listdir(opened)
        finally:
            os.close(opened)

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._folder)


def _open(folder: Path) -> int:
    ways_out = "make it yours and chmod it to 700, or name another folder in gateway.files_folder"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as err:
        raise ClusterError(f"cannot keep files in {folder}: {err.strerror}; {ways_out}") from err
    found = os.fstat(opened)
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        os.close(opened)
        raise ClusterError(f"others may enter {folder} (mode {stat.S_IMODE(found.st_mode):o}); {ways_out}")
    return opened


def _name(file_id: str, owner: str) -> str:
    if not _ID.fullmatch(file_id):
        raise _not_yours(file_id)
    return f"{file_id}.{owner}"


def _not_yours(file_id: str) -> InvalidRequest:
    return InvalidRequest("document", file_id, "is no file of yours; upload it with POST /v1/files")


@contextmanager
def _missing(file_id: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as err:
        raise _not_yours(file_id) from err


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """What the system says of a folder as a typed error; where it is stands in the gateway's log alone."""
    try:
        yield
    except OSError as err:
        logger.error("files.failed cause=%r", err)
        kind: type[ColmError] = CapacityExceeded if err.errno in (errno.ENOSPC, errno.EDQUOT) else ClusterError
        raise kind(f"files cannot be {what} by the gateway: {err.strerror}") from err
