"""Of the simulator of clusters."""

from tests.mutation.mutant import Mutant

_SIMULATE = "tests/unit/test_simulate.py::"

MUTANTS = (
    Mutant(
        "somebody who joins waits for the end of a simulated run of steps",
        "bench/simulate/decode_model.py",
        "            self._shorten(self._run)\n",
        "            pass\n",
        _SIMULATE + "test_steps_that_are_planned_alike_may_be_counted_together",
    ),
    Mutant(
        "a simulated tile is carried by one link and then by the other",
        "bench/simulate/network.py",
        "    return receiver.carry(num_bytes, begun_s=begun_s, not_before_s=left_s)\n",
        "    return receiver.carry(num_bytes, begun_s=left_s, not_before_s=left_s)\n",
        _SIMULATE + "test_a_tile_passes_both_links_at_once_and_waits_for_the_slower",
    ),
    Mutant(
        "a refused request keeps its simulated place",
        "bench/simulate/decode_model.py",
        "            self.num_requests -= 1\n",
        "            self.num_requests -= lease is not None\n",
        _SIMULATE + "test_every_request_ends_once_and_every_page_returns",
    ),
)
