"""Documents that clients upload once and ask about many times; in memory, and gone with the gateway."""

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass

from colm.errors import CapacityExceeded, InvalidRequest

MAX_FILES = 1000
"""Of all clients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A document."""

    id: str
    owner: str
    """Name of the client, who alone can see it."""
    filename: str
    purpose: str
    created_s: int
    """Unix time."""
    content: bytes

    def as_json(self) -> dict[str, object]:
        """As OpenAI's clients know it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": len(self.content),
            "created_at": self.created_s,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


class FileStore:
    """Keeps documents until they are deleted. Lives on one event loop.

    Args:
        max_bytes: of all documents.
        max_document_bytes: of one.
    """

    def __init__(self, *, max_bytes: int, max_document_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._max_document_bytes = max_document_bytes
        self._files: OrderedDict[str, StoredFile] = OrderedDict()
        self._num_bytes = 0

    def add(self, *, owner: str, filename: str, purpose: str, content: bytes) -> StoredFile:
        """Keep a document.

        Raises:
            InvalidRequest: it is too large, or not UTF-8.
            CapacityExceeded: there is no room; a file must be deleted first.
        """
        if len(content) > (limit := self._max_document_bytes):
            raise InvalidRequest("file", f"{len(content)} bytes", f"at most {limit} bytes")
        try:
            content.decode()
        except UnicodeDecodeError as err:
            raise InvalidRequest("file", filename, f"must be UTF-8 text; byte {err.start} breaks it") from err
        if self._num_bytes + len(content) > self._max_bytes or len(self._files) >= MAX_FILES:
            raise CapacityExceeded(
                f"{len(self._files)} files of {self._num_bytes} bytes are kept, and this one would not fit into "
                f"gateway.max_files_bytes={self._max_bytes}; delete some"
            )
        file = StoredFile(
            id=f"file-{secrets.token_hex(16)}",
            owner=owner,
            filename=filename[:256],
            purpose=purpose,
            created_s=int(time.time()),
            content=content,
        )
        self._files[file.id] = file
        self._num_bytes += len(content)
        return file

    def of(self, owner: str) -> list[StoredFile]:
        """A client's files, oldest first."""
        return [file for file in self._files.values() if file.owner == owner]

    def get(self, file_id: str, owner: str) -> StoredFile:
        """A client's file.

        Raises:
            InvalidRequest: there is none of that id, or it is somebody else's.
        """
        file = self._files.get(file_id)
        if file is None or file.owner != owner:
            raise InvalidRequest("document", file_id, "is no file of yours; upload it with POST /v1/files")
        return file

    def delete(self, file_id: str, owner: str) -> None:
        """Forget a client's file; requests that read it already keep their copy.

        Raises:
            InvalidRequest: as `get`.
        """
        file = self.get(file_id, owner)
        del self._files[file_id]
        self._num_bytes -= len(file.content)
