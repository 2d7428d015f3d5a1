"""Of the prefill engine: costs, packs, sparse attention."""

from tests.mutation.mutant import Mutant

_CANCELLED_PREFILLS = "tests/unit/prefill_loop/test_cancelled_prefills.py::"
_PREFILL_TURNS = "tests/unit/prefill_loop/test_prefill_turns.py::"
_SHARED_STEPS = "tests/unit/prefill_loop/test_shared_steps.py::"
_POLICY = "tests/unit/test_job_policy.py::"
_PLAN = "tests/unit/test_sparse_plan.py::"
_SPARSE_ENGINE = "tests/numerics/test_sparse_prefill_engine.py::"
_AUDIT = "tests/unit/test_sparse_audit.py::"
_PACK = "tests/numerics/test_packed_prefill.py::"

MUTANTS = (
    Mutant(
        "a cancelled engine computes its tile to the end",
        "prefill_node/engine.py",
        "        cancelled.raise_if_set()\n        return out_THE\n",
        "        return out_THE\n",
        _CANCELLED_PREFILLS + "test_a_cancelled_engine_ends_between_two_operations_of_its_tile",
    ),
    Mutant(
        "of equal prompts a later one goes first",
        "prefill_node/job_policy.py",
        "    return job.remaining_s, job.place\n",
        "    return job.remaining_s, -job.place\n",
        _POLICY + "test_the_shortest_remaining_work_goes_first_and_of_equals_the_first_in_line",
    ),
    Mutant(
        "a long prompt starves under a flood of short ones",
        "prefill_node/job_policy.py",
        "        first.owed_s += FIRST_SHARE * steps_s\n",
        "        pass\n",
        _POLICY + "test_a_long_job_ends_in_time_under_a_flood_of_short_ones",
    ),
    Mutant(
        "short prompts begin in the memory that a large one waits for",
        "prefill_node/job_policy.py",
        "        fitting = [job for job in fitting if job.is_started]\n",
        "",
        _PREFILL_TURNS + "test_a_long_prompt_that_waits_for_memory_is_not_passed_for_ever",
    ),
    Mutant(
        "a prompt begins without memory",
        "prefill_node/job_policy.py",
        "job.is_started or job.memory_bytes <= free_bytes - claimed_bytes",
        "True",
        _PREFILL_TURNS + "test_at_most_so_many_have_begun",
    ),
    Mutant(
        "a step attends with its own tile",
        "prefill_node/cost_model.py",
        "(num_tiles - 1) * self.tile_tokens if",
        "num_tiles * self.tile_tokens if",
        "tests/unit/test_cost_model.py::test_a_step_attends_with_the_tile_before_it",
    ),
    Mutant(
        "a cancelled attention is finished",
        "prefill_node/engine.py",
        "backend=self._attention_backend, cancelled=cancelled)",
        "backend=self._attention_backend)",
        _CANCELLED_PREFILLS + "test_a_cancelled_engine_does_not_finish_the_attention_that_it_is_in",
    ),
    Mutant(
        "a sparse tile lists the keys of the prompt's first rows",
        "prefill_node/engine.py",
        "plan.index(k_KSE.shape[1] - len(q_THE), q_THE)",
        "plan.index(0, q_THE)",
        _SPARSE_ENGINE + "test_keys_and_values_are_those_of_the_plans_masks",
    ),
    Mutant(
        "sparse tiles begin inside row blocks",
        "prefill_node/engine.py",
        "max(1, self.tile_tokens // ROW_BLOCK) * ROW_BLOCK",
        "self.tile_tokens",
        _SPARSE_ENGINE + "test_tiles_are_whole_row_blocks",
    ),
    Mutant(
        "lists below the floor stay sparse",
        "prefill_node/sparse/prompt_plans.py",
        "plan = plan.with_dense(found.below_floor)",
        "plan = plan.with_dense(())",
        _SPARSE_ENGINE + "test_where_nothing_is_sparse_the_bits_are_those_of_a_dense_prefill",
    ),
    Mutant(
        "a plan is made of the prompt's first rows",
        "prefill_node/sparse/prompt_plans.py",
        "torch.arange(max(0, num_tokens - ESTIMATION_ROWS), num_tokens)",
        "torch.arange(min(num_tokens, ESTIMATION_ROWS))",
        "tests/unit/test_prompt_plans.py::test_a_plan_is_made_of_the_last_rows",
    ),
    Mutant(
        "columns pass for diagonals and diagonals for columns",
        "prefill_node/sparse/lines.py",
        "by_column_S * vertical_S",
        "by_column_S",
        _PLAN + "test_a_planted_needle_is_a_vertical_and_a_planted_echo_a_slash",
    ),
    Mutant(
        "one head of a list has its share, the others what comes with it",
        "prefill_node/sparse/lines.py",
        "sum(dim=1).max())",
        "sum(dim=1).min())",
        _PLAN + "test_every_head_recalls_its_share_on_the_rows_that_were_asked",
    ),
    Mutant(
        "the last rows are as sparse as the others",
        "prefill_node/sparse/plan.py",
        "dense_from=self.dense_from)",
        "dense_from=self.num_tokens)",
        _PLAN + "test_sinks_nearest_keys_and_all_keys_of_the_last_rows_are_listed",
    ),
    Mutant(
        "an audit does not see the columns",
        "prefill_node/sparse/audit.py",
        "        listed_X += ((scores_XC - maximum_X.unsqueeze(1)).exp_() * is_alone_XC).sum(dim=1)\n",
        "",
        _PLAN + "test_recall_of_rows_is_that_of_the_indexs_own_mask",
    ),
    Mutant(
        "a plan is one long step",
        "prefill_node/prefill_run.py",
        "            next(self.planning)\n",
        "            while True:\n                next(self.planning)\n",
        _SPARSE_ENGINE + "test_between_two_tiles_of_a_sparse_layer_the_engine_may_be_given_to_others",
    ),
    Mutant(
        "an audit trusts a small sample",
        "prefill_node/sparse/audit.py",
        " - 7.0 * log / (3.0 * (num_rows - 1))",
        "",
        _AUDIT + "test_the_bound_holds_as_often_as_it_says",
    ),
    Mutant(
        "a search takes what is over its budget",
        "prefill_node/sparse/search.py",
        '.masked_fill(~fits_CH, float("-inf"))',
        "",
        "tests/unit/test_sparse_search.py::test_no_pattern_is_over_the_budget",
    ),
    Mutant(
        "a pack that is kept attends in the order of the call",
        "prefill_node/prefill_run.py",
        "sorted(self.members, key=lambda member: member[0].pack_rows.start)",
        "self.members",
        _PACK + "test_keys_and_values_are_the_oracles_however_steps_are_shared",
    ),
    Mutant(
        "a pack is kept although one has left it",
        "prefill_node/prefill_run.py",
        "(pack.num_runs, pack.start) == (len(runs), start)",
        "pack.start == start",
        _PACK + "test_keys_and_values_are_the_oracles_however_steps_are_shared",
    ),
    Mutant(
        "a run that leaves a pack forgets its hidden states",
        "prefill_node/prefill_run.py",
        "            run.hidden_ND = pack.x_RD[first:last]\n",
        "",
        _PACK + "test_keys_and_values_are_the_oracles_however_steps_are_shared",
    ),
    Mutant(
        "one error ends everybody's step",
        "prefill_node/prefill_run.py",
        "            self.error = error\n",
        "            raise\n",
        _SHARED_STEPS + "test_one_that_fails_inside_a_shared_step_ends_with_its_error_alone",
    ),
    Mutant(
        "companions slow a prompt down without end",
        "prefill_node/job_policy.py",
        "added_s <= spare_s",
        "True",
        _POLICY + "test_companions_slow_nobody_down_by_more_than_that",
    ),
    Mutant(
        "prompts of different layers share a step",
        "prefill_node/job_policy.py",
        " or job.layer != chosen.layer",
        "",
        _POLICY + "test_steps_are_shared_by_whole_prompts_at_the_same_layer_in_the_order_of_the_policy",
    ),
    Mutant(
        "a shared step is charged as if the first in line had all of it",
        "prefill_node/job_policy.py",
        "FIRST_SHARE * steps_s - own_s[first]",
        "FIRST_SHARE * steps_s - steps_s",
        _POLICY + "test_the_first_in_line_pays_for_its_share_of_a_shared_step_with_what_its_own_step_brings",
    ),
    Mutant(
        "the price of a shared step is counted for each prompt",
        "prefill_node/cost_model.py",
        '"num_steps": max(work.num_steps',
        '"num_steps": sum(work.num_steps',
        _SHARED_STEPS + "test_a_shared_step_is_predicted_and_learnt_from_once",
    ),
    Mutant(
        "a tile may be larger than memory",
        "prefill_node/memory.py",
        "tile_tokens=longest)) > memory_bytes:",
        "tile_tokens=longest)) > 2 * memory_bytes:",
        "tests/unit/test_prefill_limits.py::test_up_starts_nothing_with",
    ),
    Mutant(
        "the rows of a pack that was left are nobody's",
        "prefill_node/memory.py",
        "return max(0, tile_tokens - num_tokens) * (",
        "return 0 * (",
        _PACK + "test_what_a_run_keeps_of_a_pack_that_it_has_left_is_counted",
    ),
    Mutant(
        "a step that is over counts as the next one's work",
        "prefill_node/engine.py",
        "            run.cancelled.rewind()\n",
        "            pass\n",
        _PACK + "test_a_runs_flag_says_nothing_of_a_step_that_is_over",
    ),
    Mutant(
        "a prefill tile that takes long looks stuck",
        "prefill_node/prefill_loop.py",
        "(self.counts.engine_s, *(job.cancelled.done_share for job in self._stepping))",
        "(self.counts.engine_s,)",
        "tests/unit/prefill_loop/test_prefill_loop.py::test_what_the_engine_does_can_be_seen_inside_a_step_too",
    ),
    Mutant(
        "the last token's row reads a layer before all of its tiles are there",
        "prefill_node/engine.py",
        "tile.first_token + tile.num_tokens == run.num_tokens",
        "tile.first_token == 0 and tile.num_tokens",
        "tests/numerics/test_provisional_token.py::test_the_next_token_is_the_plain_models_and_tiles_keep_their_bits",
    ),
    Mutant(
        "the last token's row makes other products of the last tile's rows",
        "prefill_node/engine.py",
        "return few == one_more and (few",
        "return (few",
        "tests/numerics/test_provisional_token.py::test_a_row_that_rides_on_the_last_tile_changes_no_bit_of_it",
    ),
)
