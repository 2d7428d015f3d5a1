"""Reports a replica's state to the gateway, and sends its log lines where Serve's go."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from colm.nodes import REPORT_INTERVAL_S, NodeCounts, NodeReport

logger = logging.getLogger(__name__)

_SEND_TIMEOUT_S = 10.0


def log_beside(other: str) -> None:
    """Send the project's own log lines where another logger's go, e.g. into a Ray Serve replica's file."""
    for package in ("colm", "prefill_node", "decode_node", "cluster"):
        ours = logging.getLogger(package)
        ours.handlers = logging.getLogger(other).handlers
        ours.setLevel(logging.INFO)
        ours.propagate = False


async def keep_reporting(
    send: Callable[[NodeReport], Awaitable[NodeCounts | None]],
    look: Callable[[], NodeReport],
    hear: Callable[[NodeCounts], None],
) -> None:
    """Report now and every `REPORT_INTERVAL_S` seconds, until cancelled. A report that fails is dropped.

    Args:
        send: gives a report to the gateway, which may answer how many nodes there are.
        look: makes a report.
        hear: takes the answers.
    """
    while True:
        try:
            async with asyncio.timeout(_SEND_TIMEOUT_S):
                counts = await send(look())
            if counts is not None:
                hear(counts)
        except Exception as err:  # noqa: BLE001 - whatever hinders a report must not stop the node
            logger.info("report.dropped error=%r", err)
        await asyncio.sleep(REPORT_INTERVAL_S)
