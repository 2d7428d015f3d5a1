"""Runs attacks one after the other beside an honest client, and looks at what each leaves behind."""

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc

from colm.wire.endpoint import open_channel
from colm.wire.outcome import Outcome
from colm.wire.v1 import generation_service_pb2 as pb
from colm.wire.v1.generation_service_pb2_grpc import GenerationServiceStub
from tests.attack.attacks import Attack, Target, each, question, words_of
from tests.children import python

HONEST_S = 1.0
"""Within this time an honest request of one token is wanted to be answered."""
_IDLE_S = 60.0
_HONEST_CALL_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of an attack."""

    name: str
    outcome: str
    is_held_off: bool
    """The attack got what it should, nothing is held, and every honest request was answered."""
    num_honest: int
    slowest_honest_s: float
    is_timely: bool
    """The slowest honest request took at most `HONEST_S`."""


async def run(
    attacks: dict[str, Attack], target: Target, progress: Callable[[Result], None] = lambda _: None
) -> list[Result]:
    """Attack in turn. The honest client asks for one token, again and again, until the attack is over."""
    results = []
    for name, attack in attacks.items():
        async with _honest(target) as (times_s, failures):
            try:
                outcome, is_held_off = await attack(target), True
            except AssertionError as err:
                outcome, is_held_off = f"NOT HELD OFF: {err}", False
        if (held := await _held(target)) is not None:
            outcome, is_held_off = f"{outcome}; HELD: {held}", False
        slowest_s = max(times_s, default=_HONEST_CALL_S)
        if failures:
            outcome, is_held_off = f"{outcome}; {len(failures)} HONEST REQUESTS FAILED: {failures[0]}", False
        result = Result(
            name=name,
            outcome=outcome,
            is_held_off=is_held_off,
            num_honest=len(times_s) + len(failures),
            slowest_honest_s=slowest_s,
            is_timely=slowest_s <= HONEST_S,
        )
        progress(result)
        results.append(result)
    return results


@contextlib.asynccontextmanager
async def _honest(target: Target) -> AsyncIterator[tuple[list[float], list[str]]]:
    """Seconds that each honest request took, and why others failed, once the block has ended.

    The client is a process of its own, which the attack's work does not hold up; one request is over before the block.
    """
    times_s: list[float] = []
    failures: list[str] = []
    child = await asyncio.to_thread(
        lambda: subprocess.Popen(
            python(_HONEST_CLIENT, *words_of(target)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        assert (await asyncio.to_thread(child.stdout.readline)).strip() == "ready"
        yield times_s, failures
        child.stdin.close()
        for line in (await asyncio.to_thread(child.stdout.read)).splitlines():
            took, _, failure = line.partition(" ")
            if failure:
                failures.append(failure)
            else:
                times_s.append(float(took))
    finally:
        child.kill()
        await asyncio.to_thread(child.wait)
        child.stdout.close()


_HONEST_CLIENT = """
import asyncio, sys
from tests.attack.attacks import target_of
from tests.attack.runner import ask
asyncio.run(ask(target_of(sys.argv[1:4])))
"""


async def ask(target: Target) -> None:
    """Ask for one token again and again until stdin ends; print how long each answer took, or why there was none."""
    is_over = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    num_asked = 0
    async with open_channel(target.address, target.security) as channel:
        stub, metadata = GenerationServiceStub(channel), target.security.metadata()
        while num_asked < 2 or not is_over.done():
            started_s = time.monotonic()
            try:
                call = stub.Generate(each(question(1)), metadata=metadata, timeout=_HONEST_CALL_S)
                with Outcome(call).statuses():
                    async for _ in call:
                        pass
                word = f"{time.monotonic() - started_s:.3f}"
            except grpc.aio.AioRpcError as err:
                word = f"- {err.code().name}: {err.details()}"
            num_asked += 1
            print("ready" if num_asked == 1 else word, flush=True)  # noqa: T201 - the parent reads it
            await asyncio.sleep(0.1)


async def _held(target: Target) -> str | None:
    """What is held, once it has had time to be let go of; None for nothing."""
    give_up_s = time.monotonic() + _IDLE_S
    async with open_channel(target.address, target.security) as channel:
        stub, metadata = GenerationServiceStub(channel), target.security.metadata()
        while True:
            status = await stub.GetClusterStatus(pb.GetClusterStatusRequest(), metadata=metadata, timeout=_IDLE_S)
            active = [status.num_active_requests, *(node.num_active_requests for node in status.nodes)]
            queued = sum(node.num_queued_requests for node in status.nodes)
            if not max(active) and not queued:
                return None
            if time.monotonic() > give_up_s:
                return f"{max(active)} requests, {queued} queued"
            await asyncio.sleep(0.2)
