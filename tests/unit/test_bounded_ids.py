"""Ids that a caller chooses are bounded: they are written to logs and kept in tables."""

import pytest

from colm.errors import InvalidRequest
from colm.wire.prompt_stream import MAX_ID_CHARS, check_id
from tests.nodes import decode, decode_node, prefill_node
from tests.tiny import tiny_checkpoint, tiny_config


@pytest.mark.parametrize("value", ["a" * (MAX_ID_CHARS + 1), "a" * (7 << 20), "a\nrequest.accepted request=b", "\0"])
def test_an_id_that_does_not_fit_a_line_of_a_log_is_refused(value: str) -> None:
    """Bug: a transfer id of 7 MB was logged at each retry."""
    with pytest.raises(InvalidRequest, match="transfer_id=") as refusal:
        check_id("transfer_id", value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("value", ["", "7d20aa04b3f33a31-2", "a" * MAX_ID_CHARS])
def test_an_id_of_ours_is_let_through(value: str) -> None:
    assert check_id("request_id", value) == value


async def test_a_decode_node_refuses_an_id_that_is_too_long(tmp_path) -> None:
    path = str(tiny_checkpoint(tmp_path / "tiny", tiny_config()).path)
    async with prefill_node(path) as prefill, decode_node(path, [prefill.address]) as node:
        with pytest.raises(Exception, match="request_id"):
            await decode(node.address, [5, 6, 7], request_id="a" * 1000)
