"""The benchmark of recovery: what it calls a time without a token, and which replicas it expects."""

from pathlib import Path

import pytest

from bench.recovery import RecoveryCase, _Seen
from colm.events import PrefillProgress
from colm.nodes import Role


def seen(token_at_s: list[float], killed_s: float | None) -> _Seen:
    answer = _Seen()
    answer.token_at_s, answer.killed_s = token_at_s, killed_s
    return answer


def test_a_gap_counts_from_the_token_before_it_if_it_ends_after_the_kill() -> None:
    assert seen([0.0, 5.0, 5.1, 6.0, 6.1], 5.2).gap_s == pytest.approx(0.9)
    assert seen([0.0, 5.0, 5.1, 6.0, 6.1], 6.05).gap_s == pytest.approx(0.1)


def test_an_answer_in_which_nobody_was_killed_has_no_gap() -> None:
    with pytest.raises(AssertionError, match="nobody was killed"):
        _ = seen([0.0, 1.0], None).gap_s


def test_what_has_to_be_computed_again_is_no_part_of_a_recovery() -> None:
    """Asked at 100 s; 10 s undisturbed. Killed 3 s after the prefill began, and 10.7 s before the first token."""
    answer = seen([114.2], 103.5)
    answer.began_s, answer.prefill_began_s = 100.0, 100.5
    assert answer.lost_prefill(10.0) == pytest.approx(
        {"kill_to_first_token_s": 10.7, "first_token_later_s": 4.2, "computed_again_s": 3.0, "recovery_s": 1.2}
    )


def test_a_prefill_begins_with_the_first_word_of_it() -> None:
    answer = _Seen()
    answer.note(PrefillProgress(num_tokens_done=0, num_tokens_total=9))
    began_s = answer.prefill_began_s
    answer.note(PrefillProgress(num_tokens_done=5, num_tokens_total=9))
    assert began_s is not None
    assert answer.prefill_began_s == began_s


def test_one_more_replica_stands_by_of_the_role_alone() -> None:
    case = RecoveryCase(model=Path("m"), standby=Role.DECODE, max_new_tokens=9)
    assert (case.name, case.num_replicas(Role.DECODE), case.num_replicas(Role.PREFILL)) == ("decode standby", 2, 1)
