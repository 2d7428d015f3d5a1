"""The benchmark of recovery: what it calls a time without a token, and which replicas it expects."""

from pathlib import Path

import pytest

from bench.recovery import RecoveryCase, _Seen
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


def test_one_more_replica_stands_by_of_the_role_alone() -> None:
    case = RecoveryCase(model=Path("m"), standby=Role.DECODE, max_new_tokens=9)
    assert (case.name, case.num_replicas(Role.DECODE), case.num_replicas(Role.PREFILL)) == ("decode standby", 2, 1)
