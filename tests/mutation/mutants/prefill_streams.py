"""Of prompts on a prefill node: jobs, turns, streams."""

from tests.mutation.mutant import Mutant

_PREFILL_TURNS = "tests/unit/prefill_loop/test_prefill_turns.py::"
_JOB_LEASES = "tests/unit/prefill_loop/test_job_leases.py::"
_PREFILL_STALLS = "tests/unit/prefill_loop/test_prefill_stalls.py::"
_SHARED_STEPS = "tests/unit/prefill_loop/test_shared_steps.py::"
_WAITING = "tests/fault/test_waiting.py::"
_GATEWAY = "tests/fault/test_gateway.py::"
_STREAM = "tests/fault/test_kv_stream_faults.py::"

MUTANTS = (
    Mutant(
        "the engine is given to the next while a late thread runs",
        "prefill_node/prefill_loop.py",
        "        if not self._stepping:\n",
        "        if True:\n",
        "tests/unit/prefill_loop/test_cancelled_prefills.py::test_the_next_job_begins_when_a_given_up_step_has_ended_and_not_before",
    ),
    Mutant(
        "a prefill node needs no lease",
        "prefill_node/service.py",
        "            if self._leases is not None:\n",
        "            if False:\n",
        _STREAM + "test_an_expired_lease_is_worth_another_try",
    ),
    Mutant(
        "waiting is prefill",
        "prefill_node/service.py",
        "            await context.write(encode_event(pb.PullKvResponse(started=started)))\n",
        "",
        _WAITING + "test_waiting_for_a_busy_prefill_node_is_told_and_is_no_prefill",
    ),
    Mutant(
        "nobody is told how long a prompt will wait",
        "prefill_node/service.py",
        "estimated_wait_s=wait.estimated_s\n",
        "estimated_wait_s=None\n",
        _GATEWAY + "test_a_request_behind_another_prefill_hears_that_it_waits_and_for_how_long",
    ),
    Mutant(
        "an int8 transfer goes on with raw tiles",
        "prefill_node/prefill_job.py",
        "self.encoder.codec == order.codec and ",
        "",
        "tests/unit/test_prefill_job.py::test_a_job_cannot_bring_again_what_it_has_forgotten_nor_another_prompt_attention_or_codec",
    ),
    Mutant(
        "the prompts that wait for the engine are not bounded",
        "prefill_node/prefill_loop.py",
        ">= self._max_queued:",
        "> 1000:",
        _STREAM + "test_a_prefill_node_whose_line_is_full_refuses",
    ),
    Mutant(
        "a reader that does not read stops nobody",
        "prefill_node/prefill_job.py",
        "        return self.room_bytes > 0\n",
        "        return True\n",
        _STREAM + "test_a_reader_that_stores_nothing_stops_the_engine_and_gets_all_when_it_does",
    ),
    Mutant(
        "every stream brings everything",
        "prefill_node/service.py",
        "            resume_from=position,\n",
        "",
        "tests/fault/test_resume.py::test_the_node_that_holds_the_job_goes_on_and_computes_nothing_twice",
    ),
    Mutant(
        "a cancelled transfer waits for its lease",
        "prefill_node/service.py",
        "                    self._loop.give_up(stream)\n",
        "",
        "tests/fault/test_resume.py::test_a_transfer_that_is_given_up_is_forgotten_at_once",
    ),
    Mutant(
        "a quantum goes on although the window is full",
        "prefill_node/making.py",
        "self.room_bytes <= 0 or self.end == self.last",
        "self.end == self.last",
        _PREFILL_TURNS + "test_a_full_window_ends_a_quantum",
    ),
    Mutant(
        "a quantum goes on behind the last tile",
        "prefill_node/making.py",
        " or self.end == self.last",
        "",
        _PREFILL_TURNS + "test_a_quantum_ends_with_the_last_tile_however_many_were_counted",
    ),
    Mutant(
        "a job that nobody reads keeps the others waiting",
        "prefill_node/prefill_loop.py",
        "            self._forget(idle)\n",
        "",
        _PREFILL_TURNS + "test_a_job_that_nobody_reads_gives_way_when_the_engine_would_idle",
    ),
    Mutant(
        "a step's tiles that the reader has from elsewhere are counted",
        "prefill_node/tile_window.py",
        "if tile.end <= self.acknowledged:\n            self._let_go(tile)",
        "if tile.end <= self.acknowledged:\n            self.num_dropped += 1",
        "tests/unit/test_prefill_job.py::test_what_a_step_brings_that_a_newer_stream_has_from_elsewhere_is_passed_over",
    ),
    Mutant(
        "a job without a reader is kept for ever",
        "prefill_node/prefill_loop.py",
        "job.lease_ends_s <= now_s",
        "False",
        _JOB_LEASES + "test_a_job_without_a_reader_is_cancelled_and_forgotten_when_its_lease_is_over",
    ),
    Mutant(
        "a tile keeps the epoch of the stream that it was computed for",
        "prefill_node/job_stream.py",
        "if tile.epoch != self._epoch or tile.begin < self._read:",
        "if tile.begin < self._read:",
        _JOB_LEASES + "test_a_newer_stream_takes_the_job_over_and_the_older_one_is_told",
    ),
    Mutant(
        "a stream without shared memory is sent to look there",
        "prefill_node/encoded_tile.py",
        "if is_shared and encoded.slot is not None and encoded.begin >= since:",
        "if encoded.slot is not None and encoded.begin >= since:",
        "tests/unit/test_prefill_job.py::test_a_newer_stream_that_reads_no_memory_gets_on_the_stream_what_lies_there",
    ),
    Mutant(
        "a sparse transfer goes on with dense tiles",
        "prefill_node/prefill_job.py",
        "(self.sparse is None) == (order.sparse is None) and np",
        "np",
        "tests/unit/test_prefill_job.py::test_a_job_cannot_bring_again_what_it_has_forgotten_nor_another_prompt_attention_or_codec",
    ),
    Mutant(
        "nobody learns what the audits said",
        "prefill_node/service.py",
        "if (report := stream.job.sparse_report) is not None:",
        "if (report := None) is not None:",
        "tests/fault/test_sparse_requests.py::test_a_sparse_request_gets_sparse_tiles_and_learns_what_they_recall",
    ),
    Mutant(
        "a sparse prompt costs as much as a dense one",
        "prefill_node/prefill_job.py",
        "        if self.sparse is None:\n            return shape.work_before",
        "        if True:\n            return shape.work_before",
        "tests/unit/test_sparse_costs.py::test_a_sparse_job_takes_less_and_less_while_it_is_planned",
    ),
    Mutant(
        "pauses of a plan are not counted",
        "prefill_node/making.py",
        "self.num_pauses = 0 if tile.num_tokens else self.num_pauses + 1",
        "self.num_pauses = 0",
        "tests/unit/test_sparse_costs.py::test_a_sparse_job_takes_less_and_less_while_it_is_planned",
    ),
    Mutant(
        "a reader may stall for ever while nobody waits",
        "prefill_node/prefill_loop.py",
        "if now_s < job.stalled_since_s + limit_s:",
        "if not is_wanted or now_s < job.stalled_since_s + limit_s:",
        _PREFILL_STALLS + "test_a_reader_has_longer_while_nobody_waits_for_its_memory",
    ),
    Mutant(
        "a reader is hurried although nobody waits",
        "prefill_node/prefill_loop.py",
        "else (UNHURRIED_STALLS * self._stall_s",
        "else (self._stall_s",
        _PREFILL_STALLS + "test_a_reader_has_longer_while_nobody_waits_for_its_memory",
    ),
    Mutant(
        "an acknowledgement of nothing begins a reader's time anew",
        "prefill_node/prefill_job.py",
        "        if position > self.acknowledged:\n            self.stalled_since_s = None\n",
        "        self.stalled_since_s = None\n",
        _PREFILL_STALLS + "test_each_acknowledgement_begins_the_time_anew_and_one_of_nothing_does_not",
    ),
    Mutant(
        "two budgets of sparse attention are taken",
        "prefill_node/settings.py",
        "if self.sparse_mass is not None and self.sparse_keys_per_row is not None:",
        "if False:",
        "tests/unit/test_node_flags.py::test_a_bad_flag_is_refused_by_name",
    ),
    Mutant(
        "a prompt too short to be sparse shares no step because it asked",
        "prefill_node/prefill_job.py",
        "self._is_ever_planned = order.sparse is not None and order.sparse.covers_any(len(order.token_ids))",
        "self._is_ever_planned = order.sparse is not None",
        _SHARED_STEPS + "test_prompts_too_short_to_be_sparse_share_steps_with_all",
    ),
    Mutant(
        "a reader is told of less than before",
        "prefill_node/job_stream.py",
        "                    self._told = reached\n",
        "",
        _SHARED_STEPS + "test_a_reader_that_waits_for_a_tile_is_told_how_far_it_is_and_never_of_less",
    ),
    Mutant(
        "a plan's steps count nothing",
        "prefill_node/prefill_job.py",
        "        share = before + (after - before) * self.cancelled.done_share\n",
        "        share = self.cancelled.done_share\n",
        "tests/unit/test_prefill_job.py::test_a_sparse_job_reaches_a_tiles_end_with_the_plan_and_the_attention_of_the_layer_before",
    ),
    Mutant(
        "an engine that works does not wait for readers",
        "prefill_node/prefill_loop.py",
        "is_held_up = not self._stepping and any(",
        "is_held_up = any(",
        _PREFILL_STALLS + "test_only_time_in_which_full_windows_alone_hinder_the_engine_is_counted",
    ),
    Mutant(
        "a provisional token comes with every tile that is left",
        "prefill_node/job_stream.py",
        "        self._wants_next_token = False\n",
        "",
        "tests/unit/test_prefill_job.py::test_what_chain_1_says_next_is_taken_once_a_stream_by_those_that_asked_it_of_this_job",
    ),
    Mutant(
        "a provisional token of a second node is passed on",
        "colm/provisional.py",
        "if self._has_begun or self._token_id is not None:",
        "if self._has_begun:",
        "tests/unit/test_provisional.py::test_at_most_one_comes_before_the_first_token_which_alone_says_what_became_of_it",
    ),
)
