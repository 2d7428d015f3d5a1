"""The network between nodes: each node's link carries bytes at a rate in each direction, first come, first served.

Modelled: a tile leaves when its sender's link is free, and has arrived when the receiver's has carried it as well.
A switch between them is never the bound. TCP, TLS and copies cost nothing here.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Link:
    """One direction of a node's link."""

    bytes_per_s: float
    free_s: float = 0.0
    """When all that was given to it has been carried."""
    num_bytes: int = 0

    def carry(self, num_bytes: int, *, begun_s: float, not_before_s: float) -> float:
        """Carry bytes, and return when the last one is through.

        Args:
            num_bytes: to carry.
            begun_s: when the first of them may enter.
            not_before_s: when the last of them has come here, at the earliest.
        """
        # Not by `max`, which takes longer than all else here: every tile comes by twice.
        from_s = begun_s if begun_s > self.free_s else self.free_s
        free_s = from_s + num_bytes / self.bytes_per_s
        self.free_s = free_s = free_s if free_s > not_before_s else not_before_s
        self.num_bytes += num_bytes
        return free_s


def send(num_bytes: int, sender: Link, receiver: Link, *, at_s: float) -> float:
    """When bytes that are there at a moment have arrived."""
    begun_s = max(at_s, sender.free_s)
    left_s = sender.carry(num_bytes, begun_s=at_s, not_before_s=at_s)
    return receiver.carry(num_bytes, begun_s=begun_s, not_before_s=left_s)
