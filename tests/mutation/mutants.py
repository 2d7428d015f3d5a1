"""Named mutations of the serving path. Each must make its test fail: what a test does not notice, it does not prove."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of the source.

    Attributes:
        name: what no longer holds.
        path: the file, from the repository root.
        old: text that stands there exactly once.
        new: what takes its place.
        test: pytest's node id, without parameters, of a test that must fail.
    """

    name: str
    path: str
    old: str
    new: str
    test: str


_DEADLINES = "tests/fault/test_deadlines.py::"
_LOOP = "tests/fault/test_decode_loop.py::"
_WAITING = "tests/fault/test_waiting.py::"
_GATEWAY = "tests/fault/test_gateway.py::"
_STREAM = "tests/fault/test_kv_stream_faults.py::"
_FRONT_DOOR = "tests/unit/test_front_door.py::"
_CHANNELS = "tests/unit/test_channels.py::"
_FETCH = "tests/unit/test_kv_fetch.py::"
_PLAN = "tests/unit/test_sparse_plan.py::"
_AUDIT = "tests/unit/test_sparse_audit.py::"

MUTANTS = (
    # Who holds pages and engines.
    Mutant(
        "the decode loop holds no pages",
        "decode_node/decode_loop.py",
        "            self._page_line.release(member.pages)\n",
        "",
        _DEADLINES + "test_pages_stay_held_while_something_writes_into_them",
    ),
    Mutant(
        "the decode loop lets go of the pages when the reader leaves",
        "decode_node/decode_loop.py",
        "            member.is_leaving = True\n",
        "            self._dismiss(member, None)\n",
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
        "        if self._running is not None:\n            return None\n",
        "",
        "tests/unit/test_prefill_loop.py::test_the_next_job_begins_when_the_thread_has_ended_not_when_its_reader_left",
    ),
    # The decode loop.
    Mutant(
        "the batch is as large as the crowd",
        "decode_node/decode_loop.py",
        "        while self._waiting and len(self._active) < self._max_batch_size:\n",
        "        while self._waiting:\n",
        _LOOP + "test_answers_share_steps_and_never_more_than_the_batch_holds",
    ),
    Mutant(
        "a row keeps the pages of the request before",
        "decode_node/engine.py",
        "if len(tables) != len(self._tables) or any(map(is_not, tables, self._tables)):",
        "if len(tables) != len(self._tables):",
        "tests/numerics/test_decode_engine.py::test_the_batchs_table_is_made_anew_only_for_other_requests",
    ),
    Mutant(
        "the batch is always one",
        "decode_node/decode_loop.py",
        "await self._step(list(self._active))",
        "await self._step(self._active[:1])",
        _LOOP + "test_answers_share_steps_and_never_more_than_the_batch_holds",
    ),
    Mutant(
        "a failed step tells only the first",
        "decode_node/decode_loop.py",
        "            for member in members:\n                self._dismiss(member, err)\n",
        "            self._dismiss(members[0], err)\n",
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
        "decode_node/decode_loop.py",
        "            if len(self._active) >= self._max_batch_size:\n",
        "            if False:\n",
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
        "epoch=account.num_kv_streams",
        "epoch=1",
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
        "        yield pb.PullKvResponse(started=pb.TransferStarted()).SerializeToString()\n",
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
        "a prompt is sent to a node that computes another one",
        "decode_node/prefill_pool.py",
        "free = [node for node in self._nodes if not node.is_lent]",
        "free = self._nodes",
        _WAITING + "test_prompts_of_one_node_wait_where_any_free_prefill_node_can_take_them",
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
        "self._expect(epoch == self._epoch,",
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
        "colm/line.py",
        "        if len(self._places) >= self._max_waiting:\n",
        "        if False:\n",
        _STREAM + "test_a_prefill_node_whose_line_is_full_refuses",
    ),
    Mutant(
        "a reader that does not read stops nobody",
        "prefill_node/handoff.py",
        "        while not self._room.acquire(timeout=_POLL_S):\n",
        "        while False:\n",
        _STREAM + "test_a_reader_that_does_not_read_stops_the_engine_and_gets_all_when_it_does",
    ),
    Mutant(
        "a cancelled engine computes its tile to the end",
        "prefill_node/engine.py",
        "                    if is_cancelled():\n                        return\n"
        "                    x_TD += layer.after_attention(x_TD, out_THE.flatten(1), rows)\n",
        "                    x_TD += layer.after_attention(x_TD, out_THE.flatten(1), rows)\n",
        "tests/unit/test_prefill_loop.py::test_a_cancelled_engine_ends_between_two_operations_of_its_tile",
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
        "a grant that never comes is waited for",
        "cluster/replicas/lender.py",
        "                for _ in range(_BEATS_PER_GRANT):\n",
        "                while True:\n",
        "tests/unit/test_serve_lender.py::test_no_answer_is_asked_for_again",
    ),
    Mutant(
        "a replica is never given back",
        "cluster/replicas/lender.py",
        "            yield granted\n        finally:\n            grants.cancel()\n",
        "            yield granted\n        finally:\n            pass\n",
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
        "        if self._sent is not None:\n            return self._sent\n",
        "",
        "tests/contract/test_endpoint.py::test_a_refusal_in_the_middle_of_an_upload_arrives_as_itself",
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
)
