"""The paper's tables on this machine: which rows run whole, on a sample or by the model, within a budget."""

import pytest

from bench.harness.contest import Measured
from bench.prefill.plan import Group, Row, choose_modes, groups
from tests.suite_groups import FAMILY, group


def test_rows_of_a_family_take_turns_with_their_baseline() -> None:
    found = groups(["llama-3.2-1b-8-8-8-8-air", "llama-3.2-1b-16-16-air", "llama-3.1-8b"], [4096, 2048])
    assert found == [
        group(2048),
        Group(rows=(Row("llama-3.1-8b", "dense"),), num_tokens=2048),
        group(4096),
        Group(rows=(Row("llama-3.1-8b", "dense"),), num_tokens=4096),
    ]
    with pytest.raises(ValueError, match=r"\['llama'\] are not in the paper's prefill tables"):
        groups(["llama"], [2048])


def test_sparse_rows_stand_where_the_paper_has_them_and_peers_where_they_are_asked_for() -> None:
    name = FAMILY[2]
    found = groups([name], [2048, 128 << 10], peers=["p"], peers_baseline=FAMILY[0], peer_lengths=[512, 2048])
    dense = (Row(FAMILY[0], "dense"), Row(name, "dense"))
    assert found == [
        Group(rows=dense, num_tokens=512, peers=("p",), is_for_peers=True),
        Group(rows=dense, num_tokens=2048, peers=("p",)),
        Group(rows=(*dense, Row(name, "sparse")), num_tokens=128 << 10),
    ]


@pytest.mark.parametrize(
    ("budget_s", "modes"),
    [
        (0.5, ["modelled", "modelled", "modelled", "modelled"]),
        (3.0, ["sampled", "sampled", "modelled", "modelled"]),
        (7.0, ["sampled", "sampled", "sampled", "modelled"]),
        (18.0, ["whole", "sampled", "sampled", "modelled"]),
        (38.0, ["whole", "sampled", "sampled", "whole"]),
        (1e6, ["whole", "whole", "sampled", "whole"]),
    ],
)
def test_a_budget_buys_samples_first_and_then_whole_runs_from_the_cheapest(
    budget_s: float, modes: list[Measured]
) -> None:
    costs: dict[Group, dict[Measured, float]] = {
        group(1): {"sampled": 1, "whole": 11},
        group(2): {"sampled": 2, "whole": 102},
        group(3): {"sampled": 4},  # no room for the whole
        group(4): {"whole": 20},  # nothing to sample: only beside peers
    }
    assert list(choose_modes(costs, budget_s).values()) == modes


def test_short_lengths_are_sampled_before_cheaper_long_ones() -> None:
    """An 8B model at 4K costs more than a 1B one at 64K: every configuration has its short lengths first."""
    costs: dict[Group, dict[Measured, float]] = {group(1): {"sampled": 5}, group(2): {"sampled": 2}}
    assert list(choose_modes(costs, 6.0).values()) == ["sampled", "modelled"]


def test_peers_have_their_whole_runs_before_cheaper_ones_of_ours_alone() -> None:
    costs: dict[Group, dict[Measured, float]] = {
        group(1): {"sampled": 1, "whole": 5},
        group(2, "p"): {"sampled": 1, "whole": 7},
    }
    assert list(choose_modes(costs, 9.0).values()) == ["sampled", "whole"]
