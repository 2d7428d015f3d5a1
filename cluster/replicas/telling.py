"""Tells the gateway that takes this one's place what clients still use here, so that their limits hold for both."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from cluster.accounts import Accounts, Use

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
_SEND_S = 2.0
"""Longest wait for the successor; what is said later is newer."""


class Telling:
    """Tells a successor of the accounts, at once and then each second, until `end`.

    Args:
        accounts: of this gateway.
        send: gives it to the successor.
    """

    def __init__(self, accounts: Accounts, send: Callable[[Mapping[str, Use]], Awaitable[None]]) -> None:
        self._accounts = accounts
        self._send = send
        self._has_told = False
        self._keeping = asyncio.create_task(self._keep())

    async def end(self) -> None:
        """Say the last word: what was spent, and that nothing runs here, or will a moment later.

        Clients whose answers are handed over ask the successor for them at once, and must find room there.
        """
        self._keeping.cancel()
        await asyncio.wait([self._keeping])
        await self._tell({name: Use(spent=use.spent) for name, use in self._accounts.use().items()})

    async def _keep(self) -> None:
        while True:
            await self._tell(self._accounts.use())
            await asyncio.sleep(INTERVAL_S)

    async def _tell(self, uses: Mapping[str, Use]) -> None:
        if not uses and not self._has_told:
            return
        try:
            async with asyncio.timeout(_SEND_S):
                await self._send(uses)
            self._has_told = True
        except Exception as err:  # noqa: BLE001 - whatever hinders it must not keep the answers from their end
            logger.info("accounts.not_told cause=%r", err)
