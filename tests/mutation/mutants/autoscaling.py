"""Of the number of replicas that follows the load."""

from tests.mutation.mutant import Mutant

_POLICY = "tests/unit/test_autoscaling_policy.py::"

MUTANTS = (
    Mutant(
        "a lost replica is load",
        "cluster/autoscaling/policy.py",
        "is_whole=num_present >= self._num_reached",
        "is_whole=True",
        _POLICY + "test_what_is_seen_while_a_replica_is_lost_does_not_scale_up",
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
)
