"""Names for the beginnings of prompts: a digest of each block of tokens and all before it.

Equal digests mean equal tokens, whoever computes them: in another process, and against somebody who tries to make two
prompts of one digest.
"""

import json
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 32


def root_digest(*facts: str | int) -> bytes:
    """What a chain begins with: all that keys and values depend on besides tokens, and whose prompts they are."""
    return blake2b(json.dumps(facts).encode(), digest_size=DIGEST_BYTES).digest()


def block_digests(root: bytes, token_ids: NDArray[np.int64], block_tokens: int) -> Iterator[bytes]:
    """The digest of each block of a prompt, which stands for all tokens up to its end; the last block may be shorter.

    Args:
        root: of `root_digest`.
        token_ids: the prompt; each is hashed once.
        block_tokens: of a block.
    """
    digest = root
    for start in range(0, len(token_ids), block_tokens):
        digest = blake2b(
            token_ids[start : start + block_tokens].tobytes(), key=digest, digest_size=DIGEST_BYTES
        ).digest()
        yield digest
