"""Runs attacks one after the other beside an honest client, and looks at what each leaves behind."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc

from colm.wire.endpoint import open_channel
from colm.wire.outcome import Outcome
from colm.wire.v1 import generation_service_pb2 as pb
from colm.wire.v1.generation_service_pb2_grpc import GenerationServiceStub
from tests.attack.attacks import Attack, Target, _each, question

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
    """Seconds that each honest request took, and why others failed; there is one request at least."""
    times_s: list[float] = []
    failures: list[str] = []
    is_over = asyncio.Event()

    async def ask() -> None:
        async with open_channel(target.address, target.security) as channel:
            stub, metadata = GenerationServiceStub(channel), target.security.metadata()
            while not (times_s or failures) or not is_over.is_set():
                started_s = time.monotonic()
                try:
                    call = stub.Generate(_each(question(1)), metadata=metadata, timeout=_HONEST_CALL_S)
                    with Outcome(call).statuses():
                        async for _ in call:
                            pass
                    times_s.append(time.monotonic() - started_s)
                except grpc.aio.AioRpcError as err:
                    failures.append(f"{err.code().name}: {err.details()}")
                await asyncio.sleep(0.1)

    asking = asyncio.create_task(ask())
    try:
        yield times_s, failures
    finally:
        is_over.set()
        await asking


async def _held(target: Target) -> str | None:
    """What is held besides an honest request, once it has had time to be let go of; None for nothing."""
    give_up_s = time.monotonic() + _IDLE_S
    async with open_channel(target.address, target.security) as channel:
        stub, metadata = GenerationServiceStub(channel), target.security.metadata()
        while True:
            status = await stub.GetClusterStatus(pb.GetClusterStatusRequest(), metadata=metadata, timeout=_IDLE_S)
            active = [status.num_active_requests, *(node.num_active_requests for node in status.nodes)]
            queued = sum(node.num_queued_requests for node in status.nodes)
            if max(active) <= 1 and not queued:
                return None
            if time.monotonic() > give_up_s:
                return f"{max(active)} requests, {queued} queued"
            await asyncio.sleep(0.2)
