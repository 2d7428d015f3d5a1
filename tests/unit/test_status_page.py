"""The gateway's status page, looked at in a real browser, and the figures that it shows."""

import asyncio
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from httpx2 import ASGITransport
from httpx2 import AsyncClient as HttpClient
from prometheus_client import CollectorRegistry, Counter, generate_latest
from starlette.applications import Starlette

from cluster.cli import top
from cluster.client_tokens import Clients, TokenLimits, create_token
from cluster.scrape import Scrape
from cluster.status_page import board
from cluster.status_page.board import Board
from cluster.status_page.routes import PAGE, StatusPage, policy_of
from colm.nodes import ClusterStatus, PoolStatus, Role
from tests.browser import Page, page
from tests.clock import FakeClock
from tests.tiny import tiny_checkpoint
from tests.watched import watched_cluster

TOKEN = "the operator's"
STATE = "document.getElementById('state').textContent"
IS_SHOWN = "!document.getElementById('board').hidden && document.getElementById('door').hidden"
IS_ASKED = "document.getElementById('board').hidden && !document.getElementById('door').hidden"
WITH_A_TOKEN_REFUSED = "Failed to load resource: the server responded with a status of 401 (Unauthorized)"


async def show(tab: Page, token: str) -> None:
    """Give the page a token, as a person does."""
    await tab.js(f"document.getElementById('token').value = {token!r}; document.querySelector('#door button').click()")


def line_of(name: str) -> str:
    """Whether a tile's line has ever left the ground."""
    return (
        f"(document.querySelector('[data-name={name}] path').getAttribute('d').match(/ [0-9.]+/g) || [])"
        ".some((y) => Number(y) < 21.9)"
    )


async def test_the_page_shows_the_cluster_to_its_operator_and_reaches_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board, "INTERVAL_S", 0.05)
    monkeypatch.setattr(board, "_MAX_POINTS", 100_000)
    clients = Clients(TOKEN, tmp_path / "tokens.json")
    alice = create_token(tmp_path / "tokens.json", "alice", TokenLimits())
    async with page(tmp_path / "profile") as tab:
        async with watched_cluster(tiny_checkpoint(tmp_path / "tiny", tokenizer=True), clients) as address:
            await tab.view(width=1200, height=900)
            await tab.open(f"http://{address}/")
            await tab.until(IS_ASKED)
            assert await tab.js(STATE) == "a token is needed"
            for token, answer in (("wrong", "the token is wrong"), (alice, "only the operator's shows the cluster")):
                await show(tab, token)
                await tab.until(f"{STATE}.includes({answer!r}) && {IS_ASKED}")
                assert await tab.js("sessionStorage.length") == 0
            assert set(tab.complaints) == {WITH_A_TOKEN_REFUSED}
            tab.complaints.clear()

            await show(tab, TOKEN)
            await tab.until(IS_SHOWN)
            assert await tab.js("document.getElementById('model').textContent") == "tiny, chains 4, 2, 2"
            for role in ("prefill", "decode"):
                assert await tab.js(f"document.querySelectorAll('#{role} tbody tr').length") == 1
            assert not await tab.js(line_of("new_tokens_per_s"))

            body: dict[str, Any] = {"model": "tiny", "prompt": "hello " * 20, "max_tokens": 9, "ignore_eos": True}
            headers = {"authorization": f"Bearer {TOKEN}"}
            async with HttpClient(base_url=f"http://{address}/v1", headers=headers, timeout=60) as http:
                assert (await http.post("/completions", json=body)).status_code == 200
                for name in ("new_tokens_per_s", "prompt_tokens_per_s", "first_token_p50_s", "requests_per_s"):
                    await tab.until(line_of(name))
                assert await tab.js("document.getElementById('errors').textContent") == "none since somebody watches"
                assert (await http.post("/completions", json=body | {"top_p": 7})).status_code == 400
                await tab.until("document.querySelector('#errors tbody')?.textContent.includes('invalid_request')")

            await tab.view(width=360, height=740, dark=True)
            assert await tab.js("document.documentElement.scrollWidth <= innerWidth")
            assert await tab.js("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"
            assert tab.complaints == []
            assert {url for url in tab.requests if not url.startswith(f"http://{address}/")} <= {"data:,"}
            assert await tab.js("[document.cookie, localStorage.length, sessionStorage.length, location.search]") == [
                "", 0, 1, "",
            ]  # fmt: skip

            blocked = "fetch('http://127.0.0.1:9/').then(() => false, () => true)"
            assert await tab.js(blocked)
            assert any("Content Security Policy" in line for line in tab.complaints)
            await tab.js("document.getElementById('leave').click()")
            await tab.until(IS_ASKED)
            assert await tab.js("sessionStorage.length") == 0
            await show(tab, TOKEN)
            await tab.until(IS_SHOWN)
        await tab.until(f"{STATE} == 'the gateway does not answer; these figures are old'")


POOL = PoolStatus(
    role=Role.PREFILL, num_present=1, num_wanted=2, min_replicas=1, max_replicas=3, demand=1.5, queued_s=4.0
)


class Counted:
    """A cluster of one gateway, which counts its readings."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.ended = Counter("colm_requests_ended", "Requests.", ["outcome"], registry=registry)
        self.clock = FakeClock()
        self.num_reads = 0
        status = ClusterStatus(models=(), nodes=(), num_active_requests=3, metrics_address="here", pools=(POOL,))

        def read(_: str) -> Scrape:
            self.num_reads += 1
            return Scrape.parse(generate_latest(registry).decode(), self.clock.now())

        self.board = Board(lambda: status, self.clock, read)


async def test_all_who_watch_share_a_look_and_see_those_before_it() -> None:
    cluster = Counted()
    cluster.ended.labels("complete").inc()
    first, second = await asyncio.gather(cluster.board.look(), cluster.board.look())
    assert (cluster.num_reads, first.view, second.view.gateway.requests_per_s) == (1, second.view, None)
    cluster.ended.labels("complete").inc(6)
    cluster.ended.labels("capacity_exceeded").inc(2)
    cluster.ended.labels("cancelled").inc(2)
    cluster.clock.now_s += 1.9
    assert (await cluster.board.look()).history == first.history
    cluster.clock.now_s += 0.1
    third = await cluster.board.look()
    assert [each.requests_per_s for each in third.history] == [None, 5.0]
    cluster.clock.now_s += 2
    (error,) = (await cluster.board.look()).recent_errors
    assert (error.outcome, error.count, error.ago_s) == ("capacity_exceeded", 2, 2.0)
    assert cluster.num_reads == 3


async def test_what_was_seen_before_a_long_pause_is_forgotten() -> None:
    """Rates would be of the whole pause."""
    cluster = Counted()
    cluster.ended.labels("failed").inc()
    await cluster.board.look()
    cluster.clock.now_s += 2
    cluster.ended.labels("failed").inc()
    assert len((await cluster.board.look()).recent_errors) == 1
    cluster.clock.now_s += 31
    shown = await cluster.board.look()
    assert (len(shown.history), shown.recent_errors, shown.view.gateway.requests_per_s) == (1, (), None)


async def test_a_pool_that_follows_its_load_is_shown_to_the_operator_alone(tmp_path: Path) -> None:
    """Bug: a pool names its role, which is no JSON by itself, and `colm top --json` broke off."""
    cluster = Counted()
    app = Starlette(routes=StatusPage(cluster.board, Clients(TOKEN, tmp_path / "tokens.json")).routes())
    async with HttpClient(transport=ASGITransport(app=app), base_url="http://gateway") as http:
        answer = await http.get("/status.json", headers={"authorization": f"Bearer {TOKEN}"})
        alice = create_token(tmp_path / "tokens.json", "alice", TokenLimits())
        for shown in ("", "Bearer wrong", f"Bearer {alice}"):
            assert (await http.get("/status.json", headers={"authorization": shown})).status_code == 401
    assert answer.json()["view"]["pools"] == [dataclasses.asdict(POOL) | {"role": "prefill"}]
    as_json = top._AS_JSON.dump_python((await cluster.board.look()).view, mode="json")
    assert json.loads(json.dumps(as_json)) == answer.json()["view"]


def test_the_policy_lets_the_pages_own_script_run_and_nothing_else() -> None:
    policy = policy_of(PAGE.read_text())
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2
    assert policy_of(PAGE.read_text().replace("</script>", " </script>")) != policy
    # Nothing that a style attribute, a handler in an attribute or another host would do works under it.
    assert not re.search(r"""\s(style|on\w+)=|https?://(?!www\.w3\.org)""", PAGE.read_text())
