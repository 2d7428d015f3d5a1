"""A headless Chromium that a test drives, over two pipes and Chromium's own DevTools protocol.

`make browser` brings it into `build/browser`; nothing of this machine's own is used, and no port is opened.
"""

import asyncio
import base64
import fcntl
import itertools
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from tests.gates import LIMIT_S

PROGRAM = Path(__file__).parents[1] / "build" / "browser" / "chromium"
MISSING = "no browser is there; `make browser` brings one"

_FLAGS = (
    "--headless",
    "--no-sandbox",  # root has none; the pages are our own
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--font-render-hinting=none",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class Page:
    """One tab, and all that it has asked for and complained about."""

    def __init__(self, browser: "_Connection", session: str) -> None:
        self._browser = browser
        self._session = session
        self.requests: list[str] = []
        self.complaints: list[str] = []
        """Lines of the console, exceptions, and what the page's own policy has blocked."""
        self._is_loaded = asyncio.Event()

    async def command(self, method: str, **params: Any) -> dict[str, Any]:
        """Give a command of the protocol."""
        return await self._browser.command(method, params, self._session)

    async def open(self, url: str) -> None:
        """Go to an address, and wait until all that is there is loaded."""
        self._is_loaded.clear()
        failed = (await self.command("Page.navigate", url=url)).get("errorText")
        assert not failed, f"{url}: {failed}"
        async with asyncio.timeout(LIMIT_S):
            await self._is_loaded.wait()

    async def js(self, expression: str) -> Any:
        """What an expression is in the page."""
        answer = await self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Wait until an expression is true; returns what it is."""
        async with asyncio.timeout(LIMIT_S):
            while not (found := await self.js(expression)):
                await asyncio.sleep(0.02)
        return found

    async def picture(self, path: Path, *, width: int, height: int, dark: bool = False, scale: float = 1.0) -> None:
        """Take a picture of so much of the page, as PNG."""
        await self.view(width=width, height=height, dark=dark, scale=scale)
        shown = await self.command("Page.captureScreenshot", format="png")
        await asyncio.to_thread(path.write_bytes, base64.b64decode(shown["data"]))

    async def view(self, *, width: int, height: int, dark: bool = False, scale: float = 1.0) -> None:
        """Have a window of this size, by day or in the dark."""
        await self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.command("Emulation.setEmulatedMedia", features=[scheme])

    def note(self, method: str, params: dict[str, Any]) -> None:
        """Remember an event."""
        match method:
            case "Page.loadEventFired":
                self._is_loaded.set()
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.consoleAPICalled":
                self.complaints.append(" ".join(str(each.get("value")) for each in params["args"]))
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Log.entryAdded":
                self.complaints.append(params["entry"]["text"])


class _Connection:
    """Commands and their answers, each ended by a zero byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.WriteTransport) -> None:
        self._reader, self._writer = reader, writer
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.pages: dict[str, Page] = {}

    async def command(self, method: str, params: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        of = {} if session is None else {"sessionId": session}
        self._writer.write(json.dumps({"id": number, "method": method, "params": params, **of}).encode() + b"\0")
        async with asyncio.timeout(LIMIT_S):
            return await answer

    async def read(self) -> None:
        with suppress(asyncio.IncompleteReadError):
            while True:
                message = json.loads((await self._reader.readuntil(b"\0"))[:-1])
                if (waiting := self._waiting.pop(message.get("id"), None)) is not None:
                    if "error" in message:
                        waiting.set_exception(AssertionError(message["error"]))
                    else:
                        waiting.set_result(message["result"])
                elif (page := self.pages.get(message.get("sessionId", ""))) is not None:
                    page.note(message["method"], message["params"])
        for each in self._waiting.values():
            each.set_exception(AssertionError("the browser has ended"))


@asynccontextmanager
async def page(profile: Path) -> AsyncIterator[Page]:
    """A browser with one empty tab.

    Args:
        profile: a folder of its own, which need not exist.
    """
    assert PROGRAM.exists(), MISSING
    (from_us, to_it), (from_it, to_us) = os.pipe(), os.pipe()

    def wire() -> None:
        """Give the pipes the numbers that Chromium wants, whatever has them now."""
        mine, its = (fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (from_us, to_us))
        os.dup2(mine, 3)
        os.dup2(its, 4)
        os.close(mine)
        os.close(its)

    nothing = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        PROGRAM, *_FLAGS, f"--user-data-dir={profile}", stdin=nothing, stdout=nothing, stderr=nothing,
        env=os.environ | {"LD_LIBRARY_PATH": str(PROGRAM.parent / "lib")}, close_fds=False, preexec_fn=wire,
    )  # fmt: skip
    os.close(from_us)
    os.close(to_us)
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader(limit=64 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(from_it, "rb"))
    writer, _ = await loop.connect_write_pipe(asyncio.Protocol, os.fdopen(to_it, "wb"))
    connection = _Connection(reader, writer)
    reading = asyncio.create_task(connection.read())
    try:
        target = (await connection.command("Target.createTarget", {"url": "about:blank"}))["targetId"]
        attached = await connection.command("Target.attachToTarget", {"targetId": target, "flatten": True})
        tab = connection.pages[attached["sessionId"]] = Page(connection, attached["sessionId"])
        for domain in ("Network", "Runtime", "Log", "Page"):
            await tab.command(f"{domain}.enable")
        yield tab
        await connection.command("Browser.close", {})
    finally:
        writer.close()
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
        await process.wait()
        await reading
