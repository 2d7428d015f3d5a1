"""Random schedules of faults between whole messages of a KV stream, tiles of older streams among them.

The first streams of a request are spoilt, as drawn from a seed; COLM_FAULTS=N draws N times as many schedules.
"""

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from colm.kv import KvFormat
from colm.wire.tile_codec import decode_message
from decode_node import node as node_module
from decode_node.kv_fetch import RetryPolicy
from tests.leaks import nothing_left
from tests.nodes import decode, decode_node, prefill_node, spoilt_prefill, until_idle, until_prefill_idle
from tests.tiny import tiny_checkpoint

PROMPT = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(1)).tolist()
NUM_SCHEDULES = 40 * int(os.environ.get("COLM_FAULTS", "1"))
NUM_SPOILT_STREAMS = 4
SHARE = 0.12
"""Of the messages of a spoilt stream; it has twelve."""


class Schedule:
    """What becomes of each message of one request's streams."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._first_stream: int | None = None
        self._stream = 0
        self._older: list[bytes] = []
        self._passed: list[bytes] = []
        self._late: list[bytes] = []
        self.num_faults: Counter[str] = Counter()

    def __call__(self, stream: int, _: int, message: bytes) -> list[bytes] | None:
        self._first_stream = stream if self._first_stream is None else self._first_stream
        if stream != self._stream:
            self._stream, self._late = stream, []
            self._older += self._passed
            self._passed = []
        self._passed.append(message)
        if stream - self._first_stream >= NUM_SPOILT_STREAMS:
            return [message]
        late, self._late = self._late, []
        if self._draw.random() >= SHARE:
            return [message, *late]
        fault = self._draw.choice([self.flip, self.truncate, self.lose, self.repeat, self.swap, self.replay, self.cut])
        self.num_faults[fault.__name__] += 1
        spoilt = fault(message)
        return None if spoilt is None else spoilt + late

    def flip(self, message: bytes) -> list[bytes]:
        """Of the whole message; a tile's header is a hundredth of it, so half of the time it is there."""
        at = self._draw.randrange(self._draw.choice([min(60, len(message)), len(message)])) if message else 0
        return [message[:at] + bytes([message[at] ^ 1 << self._draw.randrange(8)]) + message[at + 1 :]]

    def truncate(self, message: bytes) -> list[bytes]:
        return [message[: self._draw.randrange(len(message))]]

    def lose(self, message: bytes) -> list[bytes]:
        """But not the last one: if it goes together with the last tile, both ends wait, until `stall_s` is over."""
        return [message] if _is_last(message) else []

    def repeat(self, message: bytes) -> list[bytes]:
        return [message, message]

    def swap(self, message: bytes) -> list[bytes]:
        """With the next one."""
        if _is_last(message):
            return [message]
        self._late = [message]
        return []

    def replay(self, message: bytes) -> list[bytes]:
        """Something of an older stream comes late."""
        return [self._draw.choice(self._older or self._passed), message]

    def cut(self, _: bytes) -> None:
        return None


def _is_last(message: bytes) -> bool:
    return decode_message(message)[0].WhichOneof("event") == "complete"


@pytest.mark.parametrize("tile_tokens", [31, 64])
async def test_no_schedule_of_spoilt_messages_gives_another_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tile_tokens: int
) -> None:
    monkeypatch.setattr(node_module, "RetryPolicy", lambda: RetryPolicy(first_pause_s=0.001, last_pause_s=0.001))
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    path, prompt_bytes = str(checkpoint.path), 149 * KvFormat.of(checkpoint.config, torch.float32).token_bytes
    schedule: Callable[[int, int, bytes], list[bytes] | None] = lambda *_: [_[-1]]  # noqa: E731
    num_faults, num_streams = Counter[str](), Counter[int]()
    async with (
        nothing_left(),
        prefill_node(path, job_lease_s=0.1, tile_tokens=tile_tokens) as prefill,
        spoilt_prefill(prefill.address, lambda *message: schedule(*message)) as address,
        decode_node(path, [address]) as node,
    ):
        undisturbed = await decode(node.address, PROMPT, num_chains=3)
        for seed in range(NUM_SCHEDULES):
            schedule = drawn = Schedule(seed)
            answer = await decode(node.address, PROMPT, num_chains=3)
            assert (answer.token_ids, answer.logprobs) == (undisturbed.token_ids, undisturbed.logprobs), seed
            assert answer.usage.kv_received_bytes == prompt_bytes, seed
            assert answer.usage.num_decode_prompt_tokens == 1, seed
            num_streams[answer.usage.num_kv_streams] += 1
            num_faults += drawn.num_faults
            await until_idle(node)
        await until_prefill_idle(prefill)
    assert len(num_faults) == 7, num_faults
    assert max(num_streams) > 2, num_streams
