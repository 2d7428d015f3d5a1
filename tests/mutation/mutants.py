"""Named mutations of the serving path. Each must make its test fail, or that test proves nothing about it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of the source.

    Attributes:
        name: the behaviour that the mutation breaks.
        path: the file, from the repository root.
        old: text that the file has exactly once.
        new: the text that replaces it.
        test: pytest's node id, without parameters, of a test that must fail.
    """

    name: str
    path: str
    old: str
    new: str
    test: str


_DEADLINES = "tests/fault/test_deadlines.py::"
_ENGINE = "tests/numerics/test_decode_engine.py::"
_LOOP = "tests/fault/test_decode_loop.py::"
_WAITING = "tests/fault/test_waiting.py::"
_GATEWAY = "tests/fault/test_gateway.py::"
_STREAM = "tests/fault/test_kv_stream_faults.py::"
_PREFILL = "tests/unit/test_prefill_loop.py::"
_POLICY = "tests/unit/test_job_policy.py::"
_FRONT_DOOR = "tests/unit/test_front_door.py::"
_CHANNELS = "tests/unit/test_channels.py::"
_FETCH = "tests/unit/test_kv_fetch.py::"
_END = "tests/fault/test_end_of_prompt.py::"
_PLAN = "tests/unit/test_sparse_plan.py::"
_SPARSE_ENGINE = "tests/numerics/test_sparse_prefill_engine.py::"
_AUDIT = "tests/unit/test_sparse_audit.py::"

MUTANTS = (
    # Who holds pages and engines.
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
        "the receiving thread holds no pages",
        "decode_node/kv_fetch.py",
        "        thread.add_done_callback(lambda _: loop.call_soon_threadsafe(self._page_line.release, pages))\n",
        "        self._page_line.release(pages)\n",
        _FETCH + "test_a_thread_holds_the_pages_until_it_has_ended_however_often_its_request_is_cancelled",
    ),
    Mutant(
        "the request keeps its pages for ever",
        "decode_node/requests.py",
        "        if request.pages is not None:\n",
        "        if False:\n",
        _LOOP + "test_an_answer_that_cannot_be_advanced_ends_alone",
    ),
    Mutant(
        "pages are free when the first holder lets go",
        "decode_node/page_pool.py",
        "        if self._num_holders[lease]:\n            return False\n",
        "",
        "tests/unit/test_page_pool.py::test_pages_are_free_when_the_last_holder_has_let_go_whoever_that_is",
    ),
    Mutant(
        "the engine is given to the next while a late thread runs",
        "prefill_node/prefill_loop.py",
        "        if self._stepping is None:\n",
        "        if True:\n",
        _PREFILL + "test_the_next_job_begins_when_a_given_up_step_has_ended_and_not_before",
    ),
    # The decode loop.
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
        "((a, a.next_row()) for a in self._active)",
        "((a, a.next_row()) for a in list(self._active)[:1])",
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
        "all tokens of a row stand at its first place",
        "decode_node/engine.py",
        "[row.position + i for row in plan.rows",
        "[row.position for row in plan.rows",
        _ENGINE + "test_rows_of_several_tokens_give_every_token_the_oracles_logits_and_write_what_single_tokens_do",
    ),
    Mutant(
        "a chain runs as many tokens as it has rows",
        "decode_node/engine.py",
        "chain_rows = _chain_rows(plan, num_tokens_R)",
        "chain_rows = _chain_rows(plan, [1] * len(num_tokens_R))",
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
        "heads stay in the order of the keys that they read",
        "colm/model/block.py",
        "self.attention.ungroup(cache.attend(q_RKGE), num_chains)",
        "cache.attend(q_RKGE).flatten(1)",
        "tests/unit/test_block.py::test_every_row_gets_what_the_oracle_gives_it_at_its_scale",
    ),
    Mutant(
        "what was chosen behind an answer's end belongs to it",
        "decode_node/running_answer.py",
        "            if self.finish_reason is not None:\n                break\n",
        "",
        "tests/unit/test_running_answer.py::test_several_choices_end_in_the_middle_and_what_follows_is_dropped",
    ),
    Mutant(
        "a failed step tells only the first",
        "decode_node/decode_loop.py",
        "            for member in step.answers:\n                self._end(member, err)\n",
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
        "a dead loop is healthy",
        "decode_node/node.py",
        "return self._loop_task is not None and not self._loop_task.done()",
        "return True",
        _LOOP + "test_a_loop_that_dies_tells_everybody_and_its_node_is_ill",
    ),
    Mutant(
        "nobody in front of a full batch is told",
        "decode_node/scheduler.py",
        "        return place if place >= 0 else None\n",
        "        return None\n",
        _WAITING + "test_a_full_batch_is_waited_for_with_a_word",
    ),
    # What a decode node accepts.
    Mutant(
        "the requests on a node are not bounded",
        "decode_node/requests.py",
        "        if len(self._requests) >= self._max_requests:\n",
        "        if False:\n",
        _WAITING + "test_the_requests_on_a_node_are_bounded",
    ),
    Mutant(
        "an id may run twice",
        "decode_node/requests.py",
        "        if job.request_id in self._requests:\n",
        "        if False:\n",
        _WAITING + "test_an_id_that_is_running_is_refused",
    ),
    Mutant(
        "what can never fit waits",
        "decode_node/requests.py",
        "        if num_pages > pool.num_pages:\n",
        "        if False:\n",
        _WAITING + "test_a_request_that_can_never_fit_is_not_told_to_try_later",
    ),
    Mutant(
        "who will not wait, waits",
        "decode_node/requests.py",
        "        if job.only_if_room:\n",
        "        if False:\n",
        _WAITING + "test_a_caller_that_will_not_wait_is_refused_at_once",
    ),
    Mutant(
        "ids outside the vocabulary are decoded",
        "decode_node/service.py",
        ">= self._config.vocab_size:",
        ">= 1 << 32:",
        _WAITING + "test_a_decode_node_checks_what_its_caller_should_have_checked",
    ),
    Mutant(
        "the context has no end",
        "decode_node/service.py",
        "        if total > config.max_context:\n",
        "        if False:\n",
        _WAITING + "test_a_decode_node_checks_what_its_caller_should_have_checked",
    ),
    Mutant(
        "the call's deadline is not its request's",
        "decode_node/service.py",
        "deadline=None if remaining_s is None else Deadline.after(self._clock, remaining_s)",
        "deadline=None",
        _WAITING + "test_a_calls_deadline_is_its_requests",
    ),
    Mutant(
        "a decode node needs no lease",
        "decode_node/service.py",
        "            if self._leases is not None:\n",
        "            if False:\n",
        _WAITING + "test_a_call_without_a_lease_is_told_to_get_a_new_one",
    ),
    Mutant(
        "a prefill node needs no lease",
        "prefill_node/service.py",
        "            if self._leases is not None:\n",
        "            if False:\n",
        _STREAM + "test_an_expired_lease_is_worth_another_try",
    ),
    Mutant(
        "a call may stay silent for ever",
        "colm/wire/prompt_stream.py",
        "asyncio.timeout(OPEN_TIMEOUT_S)",
        "asyncio.timeout(None)",
        _WAITING + "test_a_call_that_never_says_what_it_wants_does_not_stay",
    ),
    Mutant(
        "a caller's deadline is granted at any length",
        "cluster/front_door/plan.py",
        "limits.max_timeout_s if timeout_s is None else timeout_s)",
        "caller_waits_s if timeout_s is None else timeout_s)",
        _FRONT_DOOR + "test_the_deadline_is_the_nearer_of_the_requests_and_its_callers",
    ),
    Mutant(
        "an upload may pause for ever",
        "colm/wire/prompt_stream.py",
        "asyncio.timeout(idle_s)",
        "asyncio.timeout(None)",
        _GATEWAY + "test_an_upload_that_falls_silent_does_not_keep_its_place",
    ),
    Mutant(
        "an upload that is over still takes room",
        "cluster/front_door/prompt.py",
        "            self._num_held_bytes -= num_bytes\n",
        "            pass\n",
        _FRONT_DOOR + "test_the_uploads_of_all_requests_together_are_bounded",
    ),
    Mutant(
        "a prompt that was cut off is served",
        "colm/wire/prompt_stream.py",
        '    raise InvalidRequest("end_of_prompt"',
        '    return\n    raise InvalidRequest("end_of_prompt"',
        _END + "test_a_side_that_is_closed_before_the_end_was_cut_off_and_starts_nothing",
    ),
    Mutant(
        "work waits for the caller's half-close",
        "colm/wire/prompt_stream.py",
        """        if request.WhichOneof("part") == "end_of_prompt":
            return
        yield request
""",
        """        if request.WhichOneof("part") == "end_of_prompt":
            async for _ in requests:
                pass
            return
        yield request
""",
        _END + "test_the_whole_answer_comes_while_the_callers_side_stays_open",
    ),
    Mutant(
        "the client never says that its prompt has ended",
        "colm/client.py",
        "        yield pb.GenerateRequest(end_of_prompt=common_pb2.EndOfPrompt())\n",
        "",
        "tests/unit/test_client.py::test_the_end_of_the_prompt_is_the_last_message",
    ),
    # Fetching keys and values.
    Mutant(
        "nobody gives up",
        "decode_node/kv_fetch.py",
        "reversed(range(self._retry.max_attempts))",
        "reversed(range(99))",
        _FETCH + "test_the_last_failure_is_told_after_eight_attempts",
    ),
    Mutant(
        "the epoch never grows",
        "decode_node/kv_fetch.py",
        "account.num_kv_streams = ledger.begin()",
        "account.num_kv_streams = ledger.epoch = 1",
        _FETCH + "test_a_node_that_fails_is_replaced_under_a_new_epoch",
    ),
    Mutant(
        "a node that failed for a reason of its own is not replaced",
        "decode_node/kv_fetch.py",
        "except (PeerUnavailable, PeerFailed) as err:",
        "except PeerUnavailable as err:",
        _STREAM + "test_one_prefill_node_out_of_memory_is_replaced_by_another",
    ),
    Mutant(
        "waiting is no waiting",
        "decode_node/kv_fetch.py",
        "account.queue_s += started_s - asked_s",
        "account.queue_s += 0.0",
        _FETCH + "test_waiting_is_not_booked_as_prefill",
    ),
    Mutant(
        "waiting is prefill",
        "prefill_node/service.py",
        "            await context.write(pb.PullKvResponse(started=pb.TransferStarted()).SerializeToString())\n",
        "",
        _WAITING + "test_waiting_for_a_busy_prefill_node_is_told_and_is_no_prefill",
    ),
    Mutant(
        "a failed address never rests",
        "decode_node/prefill_pool.py",
        "            node.rests_until_s = self._clock.now() + rest_s\n",
        "",
        "tests/unit/test_prefill_pool.py::test_a_node_that_failed_is_asked_again_only_after_a_rest",
    ),
    Mutant(
        "a node takes any number of prompts",
        "decode_node/prefill_pool.py",
        " if node.num_streams < self._max_streams)",
        ")",
        "tests/unit/test_prefill_pool.py::test_a_prompt_that_finds_every_node_full_goes_to_the_next_that_has_room",
    ),
    Mutant(
        "the node with the most tokens is lent first",
        "decode_node/prefill_pool.py",
        "now_s), node.num_tokens\n",
        "now_s), -node.num_tokens\n",
        "tests/unit/test_prefill_pool.py::test_the_node_with_the_fewest_tokens_is_lent_first",
    ),
    Mutant(
        "nobody is told how long a prompt will wait",
        "prefill_node/service.py",
        "estimated_wait_s=wait.estimated_s\n",
        "estimated_wait_s=None\n",
        _GATEWAY + "test_a_request_behind_another_prefill_hears_that_it_waits_and_for_how_long",
    ),
    Mutant(
        "a damaged payload is stored",
        "colm/wire/tile_codec.py",
        "    if xxhash.xxh3_64_intdigest(payload) != header.checksum:\n",
        "    if False:\n",
        _STREAM + "test_a_spoilt_stream_is_fetched_again_and_the_answer_is_the_oracles",
    ),
    Mutant(
        "a codec that nobody reads is asked for again",
        "colm/wire/tile_codec.py",
        'raise FingerprintMismatch(f"{place} came in codec',
        'raise PeerUnavailable(f"{place} came in codec',
        _STREAM + "test_a_tile_in_another_format_is_final",
    ),
    Mutant(
        "every tile begins with a page",
        "decode_node/kv_store.py",
        "int(ids[start]) * page_tokens + begin % page_tokens",
        "int(ids[start]) * page_tokens",
        "tests/unit/test_kv_store.py::test_a_tile_lands_bit_for_bit_and_touches_nothing_else",
    ),
    Mutant(
        "a tile of an older epoch is stored",
        "decode_node/transfer_ledger.py",
        "self._expect(epoch == self.epoch,",
        "self._expect(True,",
        _STREAM + "test_a_real_tile_of_a_broken_stream_is_void_in_the_next_one",
    ),
    Mutant(
        "weights are taken for what their digest says",
        "colm/checkpoint.py",
        "    if stored != _computed_digest(checkpoint):\n",
        "    if False:\n",
        "tests/unit/test_checkpoint.py::test_a_stored_digest_is_read_without_the_weights_and_verified_with_them",
    ),
    # The prefill node.
    Mutant(
        "the prompts that wait for the engine are not bounded",
        "prefill_node/prefill_loop.py",
        ">= self._max_queued:",
        "> 1000:",
        _STREAM + "test_a_prefill_node_whose_line_is_full_refuses",
    ),
    Mutant(
        "a line is not bounded",
        "colm/line.py",
        "        if len(self._places) >= self._max_waiting:\n",
        "        if False:\n",
        "tests/unit/test_line.py::test_one_too_many_is_refused_and_the_others_keep_their_places",
    ),
    Mutant(
        "a reader that does not read stops nobody",
        "prefill_node/prefill_job.py",
        "return self._window_bytes < WINDOW_BYTES",
        "return True",
        _STREAM + "test_a_reader_that_stores_nothing_stops_the_engine_and_gets_all_when_it_does",
    ),
    # Where a node computes.
    Mutant(
        "rope's steps stay on the CPU",
        "colm/model/rope.py",
        "inverse_frequencies(config).to(device)",
        "inverse_frequencies(config)",
        "tests/numerics/test_devices.py::test_a_prefill_engine_makes_everything_on_its_device_and_attends_as_it_is_told",
    ),
    Mutant(
        "a batch's table stays on the CPU",
        "decode_node/engine.py",
        "torch.from_numpy(table_RM).to(self._device)",
        "torch.from_numpy(table_RM)",
        "tests/numerics/test_devices.py::test_a_decode_step_makes_everything_on_the_stores_device_and_crosses_once",
    ),
    Mutant(
        "a GPU is set aside that nobody can use",
        "cluster/lifecycle.py",
        "        _check_devices(config)\n",
        "        pass\n",
        "tests/unit/test_placement.py::test_up_refuses_a_gpu_that_this_machine_has_not",
    ),
    Mutant(
        "a GPU is set aside for a replica on the CPU",
        "cluster/options.py",
        'if section.num_gpus and section.device == "cpu":',
        "if False:",
        "tests/unit/test_placement.py::test_a_gpu_is_not_set_aside_to_stand_idle",
    ),
    # What a prefill engine stops for.
    Mutant(
        "a cancelled engine computes its tile to the end",
        "prefill_node/engine.py",
        "        cancelled.raise_if_set()\n        return out_THE\n",
        "        return out_THE\n",
        _PREFILL + "test_a_cancelled_engine_ends_between_two_operations_of_its_tile",
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
        "the end of a transfer is not acknowledged",
        "decode_node/kv_requests.py",
        "if self._unsaid_bytes >= ACKNOWLEDGE_BYTES or is_last:",
        "if self._unsaid_bytes >= ACKNOWLEDGE_BYTES:",
        "tests/unit/test_kv_requests.py::"
        "test_positions_are_said_when_they_are_worth_a_message_the_newest_alone_and_the_end_in_any_case",
    ),
    Mutant(
        "the node that holds the job is no better than another",
        "decode_node/prefill_pool.py",
        "return node.address != preferred, max(",
        "return False, max(",
        "tests/unit/test_prefill_pool.py::"
        "test_a_node_that_holds_the_prompt_already_is_lent_although_it_failed_unless_it_is_busy",
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
        "        first.owed_s += FIRST_SHARE * step_s\n",
        "        pass\n",
        _POLICY + "test_a_long_job_ends_in_time_under_a_flood_of_short_ones",
    ),
    Mutant(
        "short prompts begin in the memory that a large one waits for",
        "prefill_node/job_policy.py",
        "        fitting = [job for job in fitting if job.is_started]\n",
        "",
        _PREFILL + "test_a_long_prompt_that_waits_for_memory_is_not_passed_for_ever",
    ),
    Mutant(
        "a prompt begins without memory",
        "prefill_node/job_policy.py",
        "job.is_started or job.memory_bytes <= free_bytes]",
        "True]",
        _PREFILL + "test_at_most_so_many_have_begun",
    ),
    Mutant(
        "a quantum goes on although the window is full",
        "prefill_node/prefill_loop.py",
        "num_bytes >= order.room_bytes or end == order.last",
        "end == order.last",
        _PREFILL + "test_a_full_window_ends_a_quantum",
    ),
    Mutant(
        "a quantum goes on behind the last tile",
        "prefill_node/prefill_loop.py",
        " or end == order.last",
        "",
        _PREFILL + "test_a_quantum_ends_with_the_last_tile_however_many_were_counted",
    ),
    Mutant(
        "a step attends with its own tile",
        "prefill_node/cost_model.py",
        "(num_tiles - 1) * self.tile_tokens if",
        "num_tiles * self.tile_tokens if",
        "tests/unit/test_cost_model.py::test_a_step_attends_with_the_tile_before_it",
    ),
    Mutant(
        "a job that nobody reads keeps the others waiting",
        "prefill_node/prefill_loop.py",
        "            self._forget(idle)\n",
        "",
        _PREFILL + "test_a_job_that_nobody_reads_gives_way_when_the_engine_would_idle",
    ),
    Mutant(
        "a job without a reader is kept for ever",
        "prefill_node/prefill_loop.py",
        "job.lease_ends_s <= now_s",
        "False",
        _PREFILL + "test_a_job_without_a_reader_is_cancelled_and_forgotten_when_its_lease_is_over",
    ),
    Mutant(
        "a tile keeps the epoch of the stream that it was computed for",
        "prefill_node/prefill_job.py",
        "if tile.epoch != self._epoch or tile.begin < self._read:",
        "if tile.begin < self._read:",
        _PREFILL + "test_a_newer_stream_takes_the_job_over_and_the_older_one_is_told",
    ),
    Mutant(
        "a cancelled attention is finished",
        "prefill_node/engine.py",
        "backend=self._attention_backend, cancelled=cancelled)",
        "backend=self._attention_backend)",
        _PREFILL + "test_a_cancelled_engine_does_not_finish_the_attention_that_it_is_in",
    ),
    # Sparse attention in the prefill engine.
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
        "a sparse transfer goes on with dense tiles",
        "prefill_node/prefill_job.py",
        "(self.sparse is None) == (order.sparse is None) and np",
        "np",
        "tests/unit/test_prefill_job.py::"
        "test_a_job_cannot_bring_again_what_it_has_forgotten_nor_another_prompt_nor_another_attention",
    ),
    Mutant(
        "a decode node asks for dense attention whatever was ordered",
        "decode_node/kv_fetch.py",
        "            attention=order.attention,\n",
        "",
        _FETCH + "test_every_attempt_asks_for_the_same_attention_and_the_last_one_says_what_became_of_it",
    ),
    Mutant(
        "nobody learns what the audits said",
        "prefill_node/service.py",
        "if (report := stream.job.sparse_report) is not None:",
        "if (report := None) is not None:",
        "tests/fault/test_sparse_requests.py::test_a_sparse_request_gets_sparse_tiles_and_learns_what_they_recall",
    ),
    Mutant(
        "the gateway drops the client's choice of attention",
        "cluster/decode_calls.py",
        "            attention=attention_to_pb(job.attention),\n",
        "",
        "tests/fault/test_sparse_requests.py::"
        "test_the_command_asks_for_sparse_attention_and_shows_what_the_layers_recall",
    ),
    # Waiting in line.
    Mutant(
        "whoever looks first is first",
        "colm/line.py",
        "if self._places[0] is place and (taken := take())",
        "if (taken := take())",
        "tests/unit/test_line.py::test_nobody_overtakes_even_if_there_is_something_free",
    ),
    Mutant(
        "a newcomer overtakes the line",
        "colm/line.py",
        "        if not self._places and (taken := take())",
        "        if (taken := take())",
        "tests/unit/test_line.py::test_nobody_overtakes_even_if_there_is_something_free",
    ),
    Mutant(
        "those who wait hear nothing",
        "colm/line.py",
        "                await beat(self._places.index(place))\n",
        "",
        _WAITING + "test_requests_beyond_the_pages_wait_in_order_and_are_all_answered",
    ),
    Mutant(
        "freed pages wake nobody",
        "decode_node/page_line.py",
        "            self._line.look_again()\n",
        "            pass\n",
        "tests/unit/test_page_line.py::test_the_last_holders_word_frees_pages_for_the_next",
    ),
    Mutant(
        "everybody asks Serve at once",
        "cluster/replicas/lender.py",
        "        if self._somebody_asks:\n            return None\n",
        "",
        "tests/unit/test_serve_lender.py::test_only_the_first_asks_and_the_others_know_their_places",
    ),
    Mutant(
        "a replica that another lender may wait for is kept unused",
        "cluster/replicas/lender.py",
        "        return self._is_alone and call.is_in_term and is_unused\n",
        "        return call.is_in_term and is_unused\n",
        "tests/unit/test_serve_lender.py::test_a_lender_that_is_not_alone_gives_back_at_once",
    ),
    Mutant(
        "a call that is kept has no end",
        "cluster/replicas/lender.py",
        "        call.is_in_term = False\n        self._let_go(call)\n",
        "        call.is_in_term = False\n",
        "tests/unit/test_serve_lender.py::test_a_call_that_is_kept_ends_with_its_term",
    ),
    Mutant(
        "a grant that comes as its borrower gives up stays open",
        "cluster/replicas/lender.py",
        "                if taken is not call:\n",
        "                if not call.has_lease:\n",
        "tests/unit/test_serve_lender.py::test_who_gives_up_as_the_grant_comes_leaves_no_call_open",
    ),
    Mutant(
        "whoever asks Serve does not see what another has left",
        "cluster/replicas/lender.py",
        "                        taken = self._take_kept()\n",
        "                        taken = None\n",
        "tests/unit/test_serve_lender.py::test_whoever_asks_serve_is_given_what_another_leaves",
    ),
    Mutant(
        "a call brings one lease, whatever its holder wants",
        "colm/leases.py",
        "            if not again:\n                return\n",
        "            return\n",
        "tests/unit/test_leases.py::test_an_offer_goes_on_with_a_lease_of_its_own_for_each_stream",
    ),
    Mutant(
        "a grant that never comes is waited for",
        "cluster/replicas/lender.py",
        "                for _ in range(_BEATS_PER_GRANT):\n",
        "                while True:\n",
        "tests/unit/test_serve_lender.py::test_no_answer_is_asked_for_again",
    ),
    Mutant(
        "a replica is never given back",
        "cluster/replicas/lender.py",
        "            else:\n                call.end()\n",
        "            else:\n                pass\n",
        "tests/unit/test_serve_lender.py::test_a_granted_replica_is_held_until_it_is_given_back",
    ),
    # The gateway.
    Mutant(
        "the requests inside the gateway are not bounded",
        "cluster/front_door/front_door.py",
        "        if self._num_active >= self._limits.max_requests:\n",
        "        if False:\n",
        _GATEWAY + "test_the_requests_inside_are_bounded",
    ),
    Mutant(
        "a full decode node is the only one",
        "cluster/front_door/placement.py",
        "refusals_left = max(1, self._registry.count(Role.DECODE)) - 1",
        "refusals_left = 0",
        _GATEWAY + "test_a_full_decode_node_is_passed_over_for_one_with_room",
    ),
    Mutant(
        "a lost lease is the client's",
        "cluster/front_door/placement.py",
        "                if has_begun or num_lost == _MAX_LOST_CALLS:\n",
        "                if True:\n",
        _GATEWAY + "test_a_lost_lease_is_replaced_a_few_times",
    ),
    Mutant(
        "a deadline that nobody set does not know the work",
        "cluster/front_door/plan.py",
        "return min(self.default_timeout_s + work_s, self.max_timeout_s)",
        "return self.default_timeout_s",
        _GATEWAY + "test_a_deadline_that_nobody_set_grows_with_the_work",
    ),
    Mutant(
        "events pile up before a slow reader",
        "cluster/front_door/pulled.py",
        "        await may_emit.acquire()\n",
        "",
        _FRONT_DOOR + "test_a_slow_reader_holds_the_node_up",
    ),
    Mutant(
        "the work goes on when its reader has left",
        "cluster/front_door/pulled.py",
        "        running.cancel()\n        await asyncio.wait([running])\n",
        "        pass\n",
        _FRONT_DOOR + "test_leaving_early_ends_the_work",
    ),
    Mutant(
        "every lost lease is a refusal too",
        "cluster/front_door/placement.py",
        "                num_lost += 1\n",
        "                num_lost += 1\n                refusals_left -= 1\n",
        _FRONT_DOOR + "test_lost_leases_are_replaced_three_times_and_cost_no_room_elsewhere",
    ),
    # Rope scaling.
    Mutant(
        "YaRN's attention factor is left out",
        "colm/model/rope.py",
        "angles_TD.cos().mul_(self._factor), angles_TD.sin().mul_(self._factor)",
        "angles_TD.cos(), angles_TD.sin()",
        "tests/numerics/test_transformers_parity.py::test_logits_equal_transformers_for_every_rope_in_both_spellings",
    ),
    Mutant(
        "YaRN's ramp begins a plane late",
        "colm/model/rope.py",
        "math.floor(first)",
        "math.ceil(first)",
        "tests/numerics/test_transformers_parity.py::test_logits_equal_transformers_for_every_rope_in_both_spellings",
    ),
    Mutant(
        "keys of another rope scaling are taken for one's own",
        "colm/kv.py",
        "None if scaling is None else repr(scaling)",
        "None if scaling is None else scaling.kind",
        "tests/unit/test_checkpoint.py::test_the_fingerprint_changes_with_all_that_yarn_keys_depend_on",
    ),
    Mutant(
        "a model is stretched twice",
        "colm/convert/stretch.py",
        "if config.rope_scaling is not None:",
        "if False:",
        "tests/unit/test_cli_models.py::test_import_does_not_replace_a_rope_scaling_that_the_model_has",
    ),
    Mutant(
        "a stretch begins at the stretched context",
        "colm/convert/stretch.py",
        "original_max_context=config.max_context)",
        "original_max_context=max_context)",
        "tests/unit/test_cli_models.py::test_a_stretched_model_computes_what_transformers_does_with_that_scaling",
    ),
    # The wire.
    Mutant(
        "a channel is kept although its peer was lost",
        "colm/wire/channels.py",
        "            if is_kept and not is_lost:\n",
        "            if is_kept:\n",
        _CHANNELS + "test_a_peer_that_was_gone_is_called_again_without_delay",
    ),
    Mutant(
        "a lost channel is closed under its other users",
        "colm/wire/channels.py",
        "            elif not shared.num_users:\n",
        "            else:\n",
        _CHANNELS + "test_a_lost_channel_is_not_closed_under_its_other_users",
    ),
    Mutant(
        "a new channel waits as long as the lost one",
        "colm/wire/endpoint.py",
        '        ("grpc.use_local_subchannel_pool", 1),\n',
        "",
        _CHANNELS + "test_a_channel_does_not_wait_as_its_lost_predecessor_does",
    ),
    Mutant(
        "the server takes keepalives for abuse",
        "colm/wire/endpoint.py",
        '        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE.interval_ms // 2),\n',
        "",
        "tests/fault/test_silence.py::test_a_call_outlives_any_silence",
    ),
    Mutant(
        "nobody pings",
        "colm/wire/endpoint.py",
        '        ("grpc.keepalive_time_ms", KEEPALIVE.interval_ms),\n',
        "",
        "tests/fault/test_silence.py::test_a_stopped_peer_is_noticed_in_silence",
    ),
    Mutant(
        "an option that gRPC does not know",
        "colm/wire/endpoint.py",
        '"grpc.http2.ping_timeout_ms"',
        '"grpc.http2.ping_time_out_ms"',
        "tests/contract/test_endpoint.py::test_every_option_is_one_that_grpc_knows",
    ),
    Mutant(
        "a refusal in mid-upload is an internal error",
        "colm/wire/outcome.py",
        "            if self._sent is not None:\n                raise self._sent from err\n",
        "",
        "tests/contract/test_endpoint.py::test_a_refusal_in_the_middle_of_an_upload_arrives_as_itself",
    ),
    Mutant(
        "a deadline passes for a lost peer where gRPC gives the call up",
        "colm/wire/outcome.py",
        "is_over = remaining_s is not None and remaining_s <= 0",
        "is_over = False",
        "tests/contract/test_endpoint.py::test_a_message_that_fails_before_the_servers_word_is_no_internal_error",
    ),
    # What the prefill benchmark says.
    Mutant(
        "the last layer's attention counts as work",
        "colm/flops.py",
        "num_whole * attention",
        "config.num_layers * attention",
        "tests/unit/test_flops.py::test_a_prefill_is_counted_as_the_engine_runs_it",
    ),
    Mutant(
        "a prefill has the memory that other models' weights take",
        "bench/prefill/memory.py",
        "sum((held | {model: weights_bytes(config, dtype)}).values())",
        "weights_bytes(config, dtype)",
        "tests/unit/test_bench_prefill.py::test_a_length_runs_where_its_bytes_fit_beside_all_weights",
    ),
    Mutant(
        "an operation inside another is timed twice",
        "bench/prefill/parts.py",
        "            if is_inside:\n",
        "            if False:\n",
        "tests/unit/test_bench_prefill.py::test_each_operation_of_the_engine_is_timed_once_under_its_part",
    ),
    # Sparse attention.
    Mutant(
        "columns pass for diagonals and diagonals for columns",
        "prefill_node/sparse/lines.py",
        "rest_RX * (vertical_X / (vertical_X + slash_RX))",
        "rest_RX * 0.5",
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
        " | (last_X1 >= self.dense_from)",
        "",
        _PLAN + "test_sinks_nearest_keys_and_all_keys_of_the_last_rows_are_listed",
    ),
    Mutant(
        "an audit does not see the columns",
        "prefill_node/sparse/audit.py",
        " | is_column_N[key_C]",
        "",
        _PLAN + "test_recall_of_rows_is_that_of_the_indexs_own_mask",
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
        "one node's refusal is passed on at once",
        "decode_node/kv_fetch.py",
        "if err not in refusals.values():",
        "if True:",
        _FETCH + "test_what_one_node_has_no_room_for_is_asked_of_the_others_once_each",
    ),
    Mutant(
        "a replica that refused is given back before Serve has found another",
        "cluster/replicas/lender.py",
        "                passed_over.append(call)\n",
        "                call.end()\n                passed_over.append(call)\n",
        "tests/unit/test_serve_lender.py::test_a_replica_that_refused_is_held_until_serve_has_found_another",
    ),
    Mutant(
        "a node that rests is asked instead of one that refused",
        "decode_node/prefill_pool.py",
        " and n.rests_until_s <= now_s]",
        "]",
        "tests/unit/test_prefill_pool.py::test_a_node_that_rests_is_not_another_that_is_free",
    ),
    Mutant(
        "a reader may stall for ever while nobody waits",
        "prefill_node/prefill_loop.py",
        "if now_s < job.stalled_since_s + limit_s:",
        "if not is_wanted or now_s < job.stalled_since_s + limit_s:",
        "tests/unit/test_prefill_stalls.py::test_a_reader_has_longer_while_nobody_waits_for_its_memory",
    ),
    Mutant(
        "a reader is hurried although nobody waits",
        "prefill_node/prefill_loop.py",
        "else (UNHURRIED_STALLS * self._stall_s",
        "else (self._stall_s",
        "tests/unit/test_prefill_stalls.py::test_a_reader_has_longer_while_nobody_waits_for_its_memory",
    ),
    Mutant(
        "an acknowledgement of nothing begins a reader's time anew",
        "prefill_node/prefill_job.py",
        "        if position > self.acknowledged:\n            self.stalled_since_s = None\n",
        "        self.stalled_since_s = None\n",
        "tests/unit/test_prefill_stalls.py::test_each_acknowledgement_begins_the_time_anew_and_one_of_nothing_does_not",
    ),
    # What is refused before it is served.
    Mutant(
        "values that are not finite are sent",
        "colm/wire/tile_codec.py",
        "if not bytes_are_finite(part, tile.k_KTD.dtype):",
        "if part is parts[0] and not bytes_are_finite(part, tile.k_KTD.dtype):",
        "tests/fault/test_not_finite.py::test_a_tile_that_is_not_finite_is_not_sent",
    ),
    Mutant(
        "negative infinities are finite",
        "colm/finite.py",
        " and bits.view(unsigned).max() < sign + infinity",
        "",
        "tests/unit/test_finite.py::test_one_is_found_wherever_it_stands",
    ),
    Mutant(
        "a model that overflows is tried on every node",
        "colm/wire/status.py",
        "    (NotFinite, grpc.StatusCode.INTERNAL, _Kind.KIND_NOT_FINITE),\n",
        "",
        "tests/fault/test_not_finite.py::test_a_request_ends_at_the_tile_and_is_not_tried_again",
    ),
    Mutant(
        "a tile may be larger than memory",
        "prefill_node/memory.py",
        "tile_tokens=longest)) > memory_bytes:",
        "tile_tokens=longest)) > 2 * memory_bytes:",
        "tests/unit/test_prefill_limits.py::test_up_starts_nothing_with",
    ),
    Mutant(
        "a group's flags lose their prefix",
        "colm/node_cli.py",
        "    name = kind.flag_prefix + option\n",
        "    name = option\n",
        "tests/unit/test_node_flags.py::test_every_option_of_a_node_is_a_flag_of_its_command",
    ),
    Mutant(
        "two budgets of sparse attention are taken",
        "prefill_node/settings.py",
        "if self.sparse_mass is not None and self.sparse_keys_per_row is not None:",
        "if False:",
        "tests/unit/test_node_flags.py::test_a_bad_flag_is_refused_by_name",
    ),
    Mutant(
        "an empty file is a token",
        "colm/wire/security.py",
        "    if not token:\n        raise ConfigError",
        "    if False:\n        raise ConfigError",
        "tests/unit/test_token_files.py::test_a_file_without_a_token_is_refused",
    ),
    Mutant(
        "a token is sent in clear",
        "cluster/cli/submit.py",
        "if token_file is not None and ca_file is None and not plaintext:",
        "if False:",
        "tests/unit/test_token_files.py::test_a_token_is_not_sent_in_clear",
    ),
    Mutant(
        "only the least number is looked at",
        "colm/finite.py",
        "math.isfinite(lowest.item()) and math.isfinite(highest.item())",
        "math.isfinite(lowest.item())",
        "tests/unit/test_finite.py::test_one_is_found_wherever_it_stands",
    ),
    Mutant(
        "the digest of an older build vouches for finite weights",
        "colm/checkpoint.py",
        "if _DIGEST_KEY in self._metadata():",
        "if self.stored_digest() is not None:",
        "tests/unit/test_checkpoint.py::"
        "test_what_save_has_looked_at_is_not_read_again_but_what_an_older_build_wrote_is",
    ),
)
