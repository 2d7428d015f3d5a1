"""What a switch costs, from the times of steps."""

import sys

import pytest

from bench.job_switch import in_turn, main, switch_s


@pytest.mark.parametrize(
    ("lead", "order"),
    [(0, [0, 1, 0, 1, 0, 1]), (1, [0, 0, 1, 0, 1, 1]), (3, [0, 0, 0, 1, 1, 1])],
)
def test_each_prompt_makes_all_its_steps_and_the_first_one_leads(lead: int, order: list[int]) -> None:
    assert in_turn(3, lead) == order


def test_a_switch_costs_what_the_steps_behind_the_other_prompt_take_longer() -> None:
    """The median of 0.5, 0.25, 0.25 and 1.0: not steps behind their own, nor first steps, which have more to do."""
    unswitched = [[9.0, 1.0, 1.0, 1.0], [9.0, 1.0, 1.0, 1.0]]
    times = [[9.0, 50.0, 1.5, 1.25], [99.0, 1.25, 2.0, 70.0]]
    order = in_turn(4, 1)
    assert order == [0, 0, 1, 0, 1, 0, 1, 1]
    assert switch_s(order, times, unswitched) == pytest.approx(0.375)


def test_an_unknown_model_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["job_switch", "--preset", "no-such-model"])
    with pytest.raises(SystemExit):
        main()
    assert "no-such-model" in capsys.readouterr().err
