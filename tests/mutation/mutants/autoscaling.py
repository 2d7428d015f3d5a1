"""Of the number of replicas that follows the load."""

from tests.mutation.mutant import Mutant

_POLICY = "tests/unit/test_autoscaling_policy.py::"
_SCALER = "tests/unit/test_autoscaler.py::"

MUTANTS = (
    Mutant(
        "a lost replica is load",
        "cluster/autoscaling/policy.py",
        "is_whole=num_present >= self._num_reached",
        "is_whole=True",
        _POLICY + "test_what_is_seen_while_a_replica_is_lost_does_not_scale_up",
    ),
    Mutant(
        "prompts that wait for a prefill node are no load",
        "cluster/autoscaling/signals.py",
        " + sum(map(self._cost.seconds, waiting_tokens))",
        "",
        _SCALER + "test_prompts_that_wait_for_a_prefill_node_count_by_their_lengths",
    ),
    Mutant(
        "every length that ever waited for a prefill node is looked at in each report",
        "cluster/replicas/decode.py",
        "                del self._waiting_tokens[num_tokens]\n",
        "                pass\n",
        "tests/unit/test_serve_prefill_pool.py::test_lengths_of_prompts_that_wait_no_longer_are_forgotten",
    ),
    Mutant(
        "the line before prefill is load of decode",
        "cluster/autoscaling/signals.py",
        "    own = held - of_line\n",
        "    own = held\n",
        _SCALER + "test_what_stands_in_line_for_prefill_is_no_load_of_the_decode_pool",
    ),
    Mutant(
        "a new gateway begins with the fewest replicas",
        "cluster/autoscaling/autoscaler.py",
        "PoolScaler(each.limits, now_s, numbers.get(each.name))",
        "PoolScaler(each.limits, now_s)",
        _SCALER + "test_a_new_gateway_goes_on_with_the_replicas_that_there_are",
    ),
    Mutant(
        "replicas go as soon as the others can just carry the load",
        "cluster/autoscaling/policy.py",
        "math.ceil(self.demand / DOWN_SHARE - _ROUNDING)",
        "math.ceil(self.demand - _ROUNDING)",
        _POLICY + "test_those_that_stay_must_carry_the_load_with_room",
    ),
    Mutant(
        "a pool that has worked its queue off is too large",
        "cluster/autoscaling/policy.py",
        "max(min(queued_s / target_queue_s, num_prompts), num_busy)",
        "min(queued_s / target_queue_s, num_prompts)",
        _POLICY + "test_a_steady_load_is_risen_to_and_then_settled_into",
    ),
    Mutant(
        "prompts of a further model bring no prefill replica",
        "cluster/autoscaling/autoscaler.py",
        "[node.report for node in self._registry.nodes()]",
        '[node.report for node in self._registry.serving("").nodes()]',
        _SCALER + "test_each_models_decode_pool_follows_its_own_load_and_the_prefill_pool_that_of_all",
    ),
    Mutant(
        "a variant has the defaults and not the options of decode",
        "cluster/options.py",
        "return decode | given if",
        "return given if",
        _SCALER + "test_a_variant_is_scaled_as_decode_is_unless_its_section_says_otherwise",
    ),
    Mutant(
        "a gateway that has just begun counts nodes",
        "cluster/node_registry.py",
        "if self._clock.now() - self._began_s < _EXPIRES_S:",
        "if False:",
        "tests/unit/test_node_registry.py::test_how_many_nodes_there_are_is_said_once_each_has_had_time_to_report",
    ),
    Mutant(
        "replicas of a variant that goes end before its answers",
        "cluster/deployment.py",
        "            _wait_for_last_gateway(name, config.gateway.drain_s)\n",
        "",
        "tests/unit/test_succession.py::test_a_variant_goes_when_the_gateway_that_knew_it_has_ended",
    ),
)
