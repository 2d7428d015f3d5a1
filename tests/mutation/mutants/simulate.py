"""Of the simulator of clusters."""

from tests.mutation.mutant import Mutant

_SIMULATE = "tests/unit/test_simulate.py::"
_PLAN = "tests/unit/test_simulate_plan.py::"

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
    Mutant(
        "a simulated replica serves as soon as it is wanted",
        "bench/simulate/scaling.py",
        "loop.call_later(self.start_s, self._started, role)",
        "loop.call_later(0.0, self._started, role)",
        _SIMULATE + "test_a_pool_follows_its_load_and_what_it_has_when_it_shrinks_goes_on",
    ),
    Mutant(
        "a plan stops at the fewest decode replicas",
        "bench/simulate/planner.py",
        "_MORE_DECODE: Final = 2\n",
        "_MORE_DECODE: Final = 0\n",
        _PLAN + "test_the_cheapest_of_all_near_the_fewest_decode_replicas_is_found",
    ),
    Mutant(
        "of nodes on the same cores, a decode step does to a prefill what that does to it",
        "bench/simulate/processor.py",
        "Share(float(suffers), float(weighs))",
        "Share(float(weighs), float(suffers))",
        _SIMULATE + "test_users_of_shared_cores_slow_each_other_down",
    ),
    Mutant(
        "a figure of few requests is believed",
        "bench/simulate/check.py",
        "return max(self.high - self.ratio, self.ratio - self.low) <= WITHIN",
        "return True",
        _SIMULATE + "test_a_figure_of_too_few_requests_says_nothing",
    ),
    Mutant(
        "a benchmark that is ended kills the `colm up` that it waits for",
        "bench/head_of_line/clusters.py",
        "process.terminate()",
        "process.kill()",
        "tests/unit/test_bench_clusters.py::test_a_command_that_runs_is_told_to_end_and_waited_for",
    ),
    Mutant(
        "what a prompt's own first step takes counts as beside it",
        "bench/simulate/calibrate.py",
        "ttft_s - 1.5 * between.mean_s",
        "ttft_s",
        _PLAN + "test_calibration_finds_the_costs_of_a_cluster_that_are_known",
    ),
    Mutant(
        "an answer's mean gap counts its tokens",
        "bench/simulate/beside.py",
        "len(times_s) - 1) if times_s",
        "len(times_s)) if times_s",
        _PLAN + "test_calibration_finds_the_costs_of_a_cluster_that_are_known",
    ),
)
