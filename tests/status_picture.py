"""Takes the pictures of the status page that the docs show: `make picture`.

A small cluster in this process answers for some seconds, and Chromium looks at its page by day, and on a phone in the
dark.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

from httpx2 import AsyncClient as HttpClient

from cluster.client_tokens import Clients
from cluster.status_page import board
from tests.browser import page
from tests.tiny import tiny_checkpoint
from tests.watched import watched_cluster

_INTERVAL_S = 0.5
_NUM_CALLERS = 3


async def _ask(http: HttpClient, number: int, num_asks: int) -> None:
    for each in range(num_asks):
        words = " ".join(f"word{(number * 7 + each * 3 + k) % 23}" for k in range(12 + 9 * (each % 3)))
        body: dict[str, Any] = {
            "model": "tiny",
            "prompt": words,
            "max_tokens": 30 + 25 * (each % 4),
            "ignore_eos": True,
        }
        if (each, number) in ((3, 0), (7, 1)):
            body["top_p"] = 7
        await http.post("/v1/completions", json=body)
        await asyncio.sleep(0.12 * (each % 5))


async def take(folder: Path, num_asks: int) -> None:
    """Write both pictures into a folder."""
    board.INTERVAL_S = _INTERVAL_S
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = tiny_checkpoint(Path(scratch) / "tiny", tokenizer=True)
        async with (
            page(Path(scratch) / "profile") as tab,
            watched_cluster(checkpoint, Clients(None)) as address,
            HttpClient(base_url=f"http://{address}", timeout=120) as http,
        ):
            await tab.open(f"http://{address}/")
            await asyncio.gather(*(_ask(http, number, num_asks) for number in range(_NUM_CALLERS)))
            assert not tab.complaints, tab.complaints
            await tab.picture(folder / "status-page.png", width=1120, height=640, scale=1.5)
            await tab.picture(folder / "status-page-phone.png", width=390, height=790, dark=True, scale=1.5)


def main() -> None:
    """Take them."""
    parser = argparse.ArgumentParser(prog="python -m tests.status_picture", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("docs/pictures"), help="where they go; docs/pictures")
    parser.add_argument("--asks", type=int, default=12, help="of each caller before the pictures; 12")
    options = parser.parse_args()
    asyncio.run(take(options.folder, options.asks))


if __name__ == "__main__":
    main()
