"""Four times more documents than all caches hold: right answers, budgets that hold, and nothing left."""

import asyncio
from pathlib import Path

import pytest

from decode_node.engine import DecodeEngine
from tests.gates import gate_before
from tests.nodes import decode, decode_node
from tests.soak.documents import Guard, Plan, soak
from tests.tiny import tiny_checkpoint


async def test_more_documents_than_fit_change_no_token_and_no_page_in_use(tmp_path: Path) -> None:
    record = await soak(tiny_checkpoint(tmp_path / "tiny"), Plan(num_asked=45))
    assert record["problems"] == []
    assert record["num_documents"] == 4 * record["num_documents_held"]
    assert record["num_cancelled"] > 0
    assert record["evicted_pages"] > 0
    assert record["evicted_tiles"] > 0
    # Of 45 questions about 48 documents many are the first; what else could be found depends on who comes when.
    assert record["cached_share"] > 0.1


@pytest.mark.parametrize("page", [0, 1])
async def test_a_page_that_changes_under_its_answer_is_seen(tmp_path: Path, page: int) -> None:
    async with decode_node(
        str(tiny_checkpoint(tmp_path / "tiny").path), ["127.0.0.1:9"], max_local_prefill_tokens=64
    ) as node:
        guard = Guard(node, [], 0)
        with gate_before(DecodeEngine, "step") as gate:
            asking = asyncio.create_task(decode(node.address, [*range(5, 45)]))
            await gate.until_reached()
            guard.look()
            node.owner._store.k_pages_LBPKD[1, page, 3] += 1
            guard.look()
            gate.open()
            await asking
    assert len(guard.problems) == 1
