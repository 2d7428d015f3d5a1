"""Of the scale of an answer that runs."""

from tests.mutation.mutant import Mutant

_SCALE = "tests/fault/test_change_of_scale.py::"

MUTANTS = (
    Mutant(
        "load changes no scale",
        "decode_node/decode_loop.py",
        "member.scale.value.at(self.auto_scale.level)",
        "member.scale.value.num_chains",
        _SCALE + "test_a_node_under_load_gives_chains_away_before_anybody_is_refused_and_keeps_to_the_floor",
    ),
    Mutant(
        "a change of scale is answered and not made",
        "cluster/front_door/front_door.py",
        "        scale.change(wanted)\n",
        "",
        _SCALE + "test_an_answer_whose_node_is_lost_goes_on_at_the_scale_it_had",
    ),
    Mutant(
        "a larger scale is taken where it will be too slow again",
        "decode_node/auto_scale.py",
        "slowness * self._growth() <= CALM",
        "slowness <= CALM",
        "tests/unit/test_auto_scale.py::test_a_steady_load_leads_to_a_steady_level",
    ),
)
