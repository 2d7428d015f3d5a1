"""What a terminal shows of an answer while it waits."""

import pytest

from cluster.answer_view import AnswerView
from colm.events import Accepted, Event, Queued, WaitsFor


@pytest.mark.parametrize(
    ("num_ahead", "estimated_wait_s", "place"),
    [(0, None, "next"), (3, None, "3 ahead"), (0, 7.4, "next, about 0:00:07"), (2, 3725.0, "2 ahead, about 1:02:05")],
)
def test_a_wait_shows_its_place_and_its_estimated_end(
    num_ahead: int, estimated_wait_s: float | None, place: str
) -> None:
    view = AnswerView(stream_text=False)
    events: list[Event] = [
        Accepted(request_id="r", model="m", num_prompt_tokens=9, num_chains=1, max_new_tokens=1, timeout_s=1.0),
        Queued(waits_for=WaitsFor.PREFILL_NODE, num_ahead=num_ahead, estimated_wait_s=estimated_wait_s),
    ]
    for event in events:
        view.see(event)
    (task,) = view._progress.tasks
    assert task.description == "waiting for a prefill node"
    assert task.fields["speed"] == place
