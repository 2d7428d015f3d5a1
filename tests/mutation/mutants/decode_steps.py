"""Of the decode loop: steps, drafts, samples."""

from tests.mutation.mutant import Mutant

_DRAFTS = "tests/unit/test_running_answer.py::"
_DEADLINES = "tests/fault/test_deadlines.py::"
_ENGINE = "tests/numerics/test_decode_engine.py::"
_PENALTIES = "tests/unit/test_penalties.py::"
_LOOP = "tests/fault/test_decode_loop.py::"
_WAITING = "tests/fault/test_waiting.py::"

MUTANTS = (
    Mutant(
        "the decode loop never lets go of the pages of who left during a step",
        "decode_node/decode_loop.py",
        "                for member in self._scheduler.end_step():\n"
        "                    self._page_line.release(member.pages)\n",
        "                self._scheduler.end_step()\n",
        _DEADLINES + "test_pages_stay_held_while_something_writes_into_them",
    ),
    Mutant(
        "who leaves is out although a step holds it",
        "decode_node/scheduler.py",
        "        self._leaving.add(answer)\n        return False\n",
        "        return True\n",
        _DEADLINES + "test_pages_stay_held_while_something_writes_into_them",
    ),
    Mutant(
        "the batch is as large as the crowd",
        "decode_node/scheduler.py",
        "        while self._waiting and len(self._active) < self._max_batch_size:\n",
        "        while self._waiting:\n",
        _LOOP + "test_answers_share_steps_and_never_more_than_the_batch_holds",
    ),
    Mutant(
        "a row keeps the pages of the request before",
        "decode_node/engine.py",
        "if len(tables) != len(self._tables) or any(map(is_not, tables, self._tables)):",
        "if len(tables) != len(self._tables):",
        _ENGINE + "test_the_batchs_table_is_made_anew_only_for_other_requests",
    ),
    Mutant(
        "the batch is always one",
        "decode_node/scheduler.py",
        "for answer in self._active:\n            rows",
        "for answer in list(self._active)[:1]:\n            rows",
        _LOOP + "test_answers_share_steps_and_never_more_than_the_batch_holds",
    ),
    Mutant(
        "rows stand in order of coming",
        "decode_node/scheduler.py",
        "key=lambda pair: pair[1].num_chains, reverse=True)",
        "key=lambda pair: 0)",
        "tests/unit/test_scheduler.py::test_larger_scales_stand_first_and_of_equals_whoever_came_first",
    ),
    Mutant(
        "prompts of any number of tokens share a step",
        "decode_node/scheduler.py",
        "if num_prompt_tokens and num_prompt_tokens + of_prompt > MAX_PROMPT_TOKENS:",
        "if False:",
        "tests/unit/test_scheduler.py::test_prompts_too_long_for_one_step_wait_for_the_next_and_nobody_waits_for_ever",
    ),
    Mutant(
        "a prompt's pieces stand at its first place",
        "decode_node/running_answer.py",
        "PlanRow(piece, first + start, 1",
        "PlanRow(piece, first, 1",
        "tests/unit/test_running_answer.py::test_the_first_step_reads_a_prompt_that_the_cache_does_not_hold",
    ),
    Mutant(
        "a prompt asks for logits of all its pieces",
        "decode_node/running_answer.py",
        "table_M, num_logits=0)",
        "table_M)",
        _LOOP + "test_a_short_prompt_is_answered_where_no_prefill_node_is_and_as_if_there_were_one",
    ),
    Mutant(
        "all tokens of a row stand at its first place",
        "decode_node/engine.py",
        "[row.position + i for row in plan.rows",
        "[row.position for row in plan.rows",
        _ENGINE + "test_rows_of_several_tokens_give_every_token_the_oracles_logits_and_write_what_single_tokens_do",
    ),
    Mutant(
        "a chain runs as many tokens as it has rows",
        "decode_node/engine.py",
        "chain_rows=_chain_rows(plan, num_tokens_R)",
        "chain_rows=_chain_rows(plan, [1] * len(num_tokens_R))",
        _ENGINE + "test_rows_of_several_tokens_give_every_token_the_oracles_logits_and_write_what_single_tokens_do",
    ),
    Mutant(
        "a row's first tokens get the logits",
        "decode_node/engine.py",
        "normed_TD = normed_TD[asked_Q]",
        "normed_TD = normed_TD[: len(asked_Q)]",
        _ENGINE + "test_only_the_last_tokens_of_a_row_that_ask_for_logits_get_them",
    ),
    Mutant(
        "a row of two logits leaves one to its neighbour",
        "decode_node/decode_loop.py",
        "list(islice(choices, row.num_logits))",
        "list(islice(choices, 1))",
        _LOOP + "test_rows_of_several_tokens_share_steps_with_ordinary_ones",
    ),
    Mutant(
        "what was chosen behind an answer's end belongs to it",
        "decode_node/running_answer.py",
        "if self.finish_reason is not None or outcome.token_id != draft:",
        "if outcome.token_id != draft:",
        "tests/unit/test_running_answer.py::test_several_choices_end_in_the_middle_and_what_follows_is_dropped",
    ),
    Mutant(
        "what follows a refused draft belongs to the answer",
        "decode_node/running_answer.py",
        "if self.finish_reason is not None or outcome.token_id != draft:",
        "if self.finish_reason is not None:",
        _DRAFTS + "test_drafts_count_up_to_the_first_that_is_another_than_what_all_chains_choose",
    ),
    Mutant(
        "drafts run past the last token that an answer may have",
        "decode_node/running_answer.py",
        "min(room, self._drafter.num_drafts(num_answers))",
        "self._drafter.num_drafts(num_answers)",
        _DRAFTS + "test_no_draft_lies_behind_the_last_token_that_the_answer_may_have",
    ),
    Mutant(
        "an answer drafts on behind its end",
        "decode_node/running_answer.py",
        "if isinstance(outcome, ColmError) or outcome.token_id in self._stop_token_ids:",
        "if isinstance(outcome, ColmError):",
        _DRAFTS + "test_nothing_is_drafted_behind_a_draft_that_would_end_the_answer_nor_where_chain_1_chose_nothing",
    ),
    Mutant(
        "a step drafts for some while others read all chains",
        "decode_node/scheduler.py",
        "                return {}\n",
        "                continue\n",
        "tests/unit/test_scheduler.py::test_a_step_drafts_only_while_everybody_of_more_than_one_chain_wants_to",
    ),
    Mutant(
        "drafts make a step of any size",
        "decode_node/scheduler.py",
        "num_cut = min(excess, row.num_drafts)",
        "num_cut = 0",
        "tests/unit/test_scheduler.py::test_drafts_give_way_where_a_step_would_be_larger_than_it_may_be",
    ),
    Mutant(
        "every token has the same random number",
        "decode_node/sampler.py",
        "sampler.uniform(position)",
        "sampler.uniform(0)",
        "tests/unit/test_sampling.py::test_tokens_are_drawn_as_often_as_they_are_likely",
    ),
    Mutant(
        "penalties are counted once a step, and not draft by draft",
        "decode_node/sampler.py",
        "self._draft_token_ids[: position - self._next_position]",
        "()",
        _PENALTIES + "test_logits_are_edited_as_the_formulas_say_behind_any_text_and_any_drafts",
    ),
    Mutant(
        "a node that takes over counts its own tokens only",
        "decode_node/running_answer.py",
        "        self.sampler.take(token_id)\n",
        "",
        _PENALTIES + "test_a_node_that_takes_over_edits_as_the_lost_one_would_have",
    ),
    Mutant(
        "an end is chosen before the least length",
        "decode_node/sampler.py",
        "if position >= self._free_position or",
        "if position > -1 or",
        _PENALTIES + "test_no_end_is_chosen_before_the_least_length_unless_there_is_nothing_else",
    ),
    Mutant(
        "a failed step tells only the first",
        "decode_node/decode_loop.py",
        "            for member in dict.fromkeys(step.answers):\n                self._end(member, err)\n",
        "            self._end(step.answers[0], err)\n",
        _LOOP + "test_a_failed_step_is_told_to_everybody_in_it_and_the_next_request_is_served",
    ),
    Mutant(
        "an answer that cannot be advanced ends the loop",
        "decode_node/decode_loop.py",
        '            logger.exception("decode.advance failed")\n',
        "            raise\n",
        _LOOP + "test_an_answer_that_cannot_be_advanced_ends_alone",
    ),
    Mutant(
        "a loop that has ended takes new answers",
        "decode_node/decode_loop.py",
        "        if self._has_stopped:\n",
        "        if False:\n",
        _LOOP + "test_a_loop_that_dies_tells_everybody_and_its_node_is_ill",
    ),
    Mutant(
        "nobody in front of a full batch is told",
        "decode_node/scheduler.py",
        "        return place if place >= 0 else None\n",
        "        return None\n",
        _WAITING + "test_a_full_batch_is_waited_for_with_a_word",
    ),
    Mutant(
        "a batch's table stays on the CPU",
        "decode_node/engine.py",
        "torch.from_numpy(table_RM).to(self._device)",
        "torch.from_numpy(table_RM)",
        "tests/numerics/test_devices.py::test_a_decode_step_makes_everything_on_the_stores_device_and_crosses_once",
    ),
    Mutant(
        "tokens that are read without logits are read again",
        "decode_node/running_answer.py",
        "        self._note_read(self._num_next)\n",
        "        self._note_read(self._num_next if choices else 0)\n",
        "tests/unit/test_running_answer.py::test_an_answer_that_another_node_began_goes_on_as_it_would_have_there",
    ),
    Mutant(
        "the one call is never made",
        "decode_node/engine.py",
        'one_call.variant_for(len(x_TD))) != "torch":',
        'one_call.variant_for(len(x_TD))) == "none":',
        "tests/numerics/test_decode_step.py::test_steps_that_the_library_takes_run_in_one_call",
    ),
)
