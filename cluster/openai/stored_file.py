"""A document as a file: a head of fixed size with what is known of it and two digests, then its text."""

import hashlib
import json
import os
from dataclasses import dataclass

HEAD_BYTES = 4096
"""Before a document in its file: what is known of it, and the digests of that and of the document."""
MAX_NAME_CHARS = 256
"""Of a document's name; the head has room for them, whatever they are."""


class Damaged(Exception):
    """A file is not what was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A document, without its text."""

    id: str
    filename: str
    purpose: str
    created_s: float
    """Unix time."""
    num_bytes: int
    is_damaged: bool = False

    def as_json(self) -> dict[str, object]:
        """As OpenAI's clients know it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": int(self.created_s),
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "error" if self.is_damaged else "processed",
        }


def head_of(file: StoredFile, content: bytes) -> bytes:
    """A document's head, HEAD_BYTES long: the digest of the rest of it, then JSON and spaces."""
    facts = {
        "filename": file.filename,
        "purpose": file.purpose,
        "created_s": file.created_s,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    text = json.dumps(facts).encode().ljust(HEAD_BYTES - 65)
    assert len(text) == HEAD_BYTES - 65, "256 characters of a name, each of at most 12 bytes, have room"
    return hashlib.sha256(text).hexdigest().encode() + b"\n" + text


def parse_head(file_id: str, head: bytes) -> tuple[StoredFile, str]:
    """What a head says, and the document's digest.

    Raises:
        Damaged: it is not as it was written.
    """
    digest, text = head[:65], head[65:]
    if len(head) != HEAD_BYTES or hashlib.sha256(text).hexdigest().encode() + b"\n" != digest:
        raise Damaged
    facts = json.loads(text)
    file = StoredFile(
        id=file_id,
        filename=facts["filename"],
        purpose=facts["purpose"],
        created_s=facts["created_s"],
        num_bytes=facts["bytes"],
    )
    return file, facts["sha256"]


def damaged(file_id: str, found: os.stat_result) -> StoredFile:
    """What is known of a document whose head is damaged."""
    return StoredFile(
        id=file_id,
        filename="",
        purpose="",
        created_s=found.st_mtime,
        num_bytes=max(0, found.st_size - HEAD_BYTES),
        is_damaged=True,
    )
