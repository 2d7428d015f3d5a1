"""Remembers which node was sent which beginnings of prompts, and may still have their keys and values.

A gateway asks for decode nodes, which keep pages; a decode node for prefill nodes, which keep what they have computed.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from colm.prefix import block_digests, root_digest

BLOCK_TOKENS: Final = 512
MAX_BLOCKS: Final = 1 << 16
"""That are remembered: 32M tokens, about 10 MB."""
MAX_MORE_REQUESTS: Final = 4
"""A node of so many requests beyond twice those of the least busy one is no place for one more."""


class PrefixRoutes:
    """A hint of where a prompt is best sent; a wrong one costs time and never an answer."""

    def __init__(self) -> None:
        self._addresses: OrderedDict[bytes, str] = OrderedDict()  # oldest first

    def keys(self, token_ids: NDArray[np.int64], cache_salt: bytes) -> tuple[bytes, ...]:
        """The digests by which a prompt's beginnings are remembered, shortest first; the last is the whole prompt's."""
        return tuple(block_digests(root_digest(cache_salt.hex()), token_ids, BLOCK_TOKENS))

    def remembered(self, keys: Sequence[bytes]) -> str | None:
        """The address of the node that got the longest beginning; None of a prompt that begins like no other."""
        return next((self._addresses[key] for key in reversed(keys) if key in self._addresses), None)

    def find(self, keys: Sequence[bytes], loads: Mapping[str, int]) -> str | None:
        """The address of the node that got the longest beginning, unless it is gone, or others are much less busy.

        Args:
            keys: of `keys`.
            loads: requests of each node that is there, by address.
        """
        address = self.remembered(keys)
        if address is None or address not in loads or loads[address] > 2 * min(loads.values()) + MAX_MORE_REQUESTS:
            return None
        return address

    def note(self, keys: Sequence[bytes], address: str) -> None:
        """Note that a node gets a prompt."""
        for key in reversed(keys):  # so that a beginning is remembered for longer than what follows it
            self._addresses[key] = address
            self._addresses.move_to_end(key)
        while len(self._addresses) > MAX_BLOCKS:
            self._addresses.popitem(last=False)
