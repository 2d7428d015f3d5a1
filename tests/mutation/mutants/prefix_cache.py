"""Mutants of what a prefill node keeps for later prompts, and of streams that begin at a token."""

from tests.mutation.mutant import Mutant

_PREFILL_PREFIXES = "tests/unit/prefill_loop/test_prefill_prefixes.py::"
_UPLINK = "tests/fault/test_prefix_uplink.py::"
_TOKEN = "tests/fault/test_streams_from_a_token.py::"

MUTANTS = (
    Mutant(
        "a stream from a token leaves its prefix out of one layer alone",
        "prefill_node/encoded_tile.py",
        "if tile.layer == since.layer else self.first_token",
        "if tile.layer == since.layer else 0",
        _TOKEN + "test_what_follows_a_token_is_sent_as_in_a_stream_of_everything",
    ),
    Mutant(
        "a stream of another salt goes on with a transfer's job",
        "prefill_node/prefill_job.py",
        "(self.encoder.first_token, self.cache_salt) == (order.first_token, order.cache_salt)",
        "self.encoder.first_token == order.first_token",
        "tests/unit/test_prefill_job.py::test_a_job_cannot_bring_again_what_it_has_forgotten_nor_another_prompt_attention_or_codec",
    ),
    Mutant(
        "what was kept for one salt is found by another",
        "prefill_node/prefix_cache.py",
        'root_digest(self._fingerprint, "dense", salt.hex())',
        'root_digest(self._fingerprint, "dense")',
        "tests/unit/test_prefix_cache.py::test_a_prompt_is_found_whole_and_one_that_begins_alike_up_to_the_last_whole_tile",
    ),
    Mutant(
        "a tile is found by its own ids alone",
        "colm/prefix.py",
        "key=digest, digest_size",
        "key=root, digest_size",
        "tests/unit/test_prefix_cache.py::test_a_tile_is_not_found_behind_another_prefix",
    ),
    Mutant(
        "a tile makes way while a job reads it",
        "prefill_node/prefix_cache.py",
        "if not self._tiles[key].num_holders), None)",
        "), None)",
        "tests/unit/test_prefix_cache.py::test_what_a_job_reads_does_not_make_way",
    ),
    Mutant(
        "a chain is evicted from its beginning",
        "prefill_node/prefix_cache.py",
        "for kept in reversed(filled):",
        "for kept in filled:",
        "tests/unit/test_prefix_cache.py::test_a_document_loses_its_end_first",
    ),
    Mutant(
        "a wrong tile that comes up is kept where it was to lie",
        "prefill_node/prefix_uplink.py",
        "if (tile.layer, tile.first_token) != self._next:",
        "if False:",
        _UPLINK + "test_a_wrong_tile_is_refused_by_name_and_its_prompt_computed",
    ),
    Mutant(
        "all of a prompt's beginning comes up at once",
        "prefill_node/prefix_uplink.py",
        "end_token = min(self._stored_token + self._window_tokens, self._end_token)",
        "end_token = self._end_token",
        _UPLINK + "test_the_rest_has_the_same_bits_and_a_window_bounds_what_comes_up",
    ),
    Mutant(
        "a stream that goes on forgets what had come up",
        "prefill_node/prefix_cache.py",
        "        if kept.key in self._tiles:  # another job",
        "        if True:  # another job",
        _UPLINK + "test_what_came_before_a_stream_broke_does_not_come_again",
    ),
    Mutant(
        "a prompt computes what another one brings up",
        "prefill_node/job_stream.py",
        "for each in (self.uplink, self.awaited))",
        "for each in (self.uplink,))",
        _UPLINK + "test_questions_that_come_together_have_one_beginning_brought_up",
    ),
    Mutant(
        "a slow stream is held against all later ones",
        "prefill_node/prefix_uplink.py",
        "            self._measure(FLOOR_BYTES_S, 1.0)  # a slow stream is not held against later ones for ever\n",
        "",
        "tests/unit/test_prefix_uplinks.py::test_a_slow_stream_stops_the_next_one_and_is_forgotten",
    ),
    Mutant(
        "a beginning in int8 pages is offered",
        "decode_node/prefix_sender.py",
        ' and store.layout.cache_dtype == "model" else None',
        " else None",
        _UPLINK + "test_what_was_ever_int8_is_not_offered",
    ),
    Mutant(
        "a beginning of other tiles than it is named by is offered",
        "decode_node/shared_prefill.py",
        "is_exact = all(source.is_exact for source in sources)",
        "is_exact = True",
        _UPLINK + "test_a_beginning_of_other_tiles_than_it_is_named_by_is_not_offered",
    ),
    Mutant(
        "keys and values are taken from whoever calls in plaintext",
        "prefill_node/node.py",
        "takes_prefixes=(tls := self._security.current_tls) is not None and tls.caller_name is not None,",
        "takes_prefixes=True,",
        _UPLINK + "test_callers_that_show_no_certificate_of_a_decode_node_are_asked_for_nothing",
    ),
    Mutant(
        "what was computed in company is kept",
        "prefill_node/prefill_loop.py",
        "self.prefixes.abandon(each.hold)",
        "pass",
        _PREFILL_PREFIXES + "test_a_prompt_that_began_alone_and_found_company_is_not_kept",
    ),
    Mutant(
        "a job that has ended leaves what its step still reads",
        "prefill_node/prefill_loop.py",
        "if job not in self._stepping and job is not self._kept.reading:",
        "if job is not self._kept.reading:",
        _PREFILL_PREFIXES + "test_what_a_step_reads_is_held_until_it_has_ended",
    ),
    Mutant(
        "a job that has ended leaves the kept tiles that are being read",
        "prefill_node/prefill_loop.py",
        "if job not in self._stepping and job is not self._kept.reading:",
        "if job not in self._stepping:",
        _PREFILL_PREFIXES + "test_kept_tiles_are_held_until_nobody_reads_them",
    ),
    Mutant(
        "a prompt that is kept whole takes a turn of the engine",
        "prefill_node/prefill_job.py",
        "return self.end if is_kept else KV_START",
        "return KV_START",
        _PREFILL_PREFIXES + "test_a_prompt_that_is_kept_whole_needs_no_engine",
    ),
    Mutant(
        "what is kept of a prompt waits for its first step",
        "prefill_node/prefill_loop.py",
        "                ahead.start()\n",
        "                pass\n",
        _PREFILL_PREFIXES + "test_what_is_kept_of_a_prompt_is_sent_before_the_engine_has_its_turn",
    ),
    Mutant(
        "a prompt that is kept whole begins without memory",
        "prefill_node/job_policy.py",
        "return job.memory_bytes <= memory_bytes - sum(taken)",
        "return True",
        _PREFILL_PREFIXES + "test_a_prompt_that_is_kept_whole_waits_for_memory_alone",
    ),
    Mutant(
        "what comes later takes the memory of what is kept whole",
        "prefill_node/job_policy.py",
        "free_bytes - claimed_bytes",
        "free_bytes",
        "tests/unit/test_job_policy.py::test_who_comes_later_leaves_what_is_kept_whole_its_memory",
    ),
    Mutant(
        "computed tiles pass the kept ones before them",
        "prefill_node/tile_window.py",
        "while self._behind and self._behind[0].begin < self.next_kept:",
        "while self._behind:",
        "tests/unit/test_prefill_job.py::test_what_is_computed_waits_for_the_kept_tiles_before_it",
    ),
    Mutant(
        "kept tiles end where they had ended when they were begun",
        "prefill_node/kept_maker.py",
        "            self.end = at = KvPosition(at.layer, kept.first_token + kept.num_tokens)\n"
        "            if kept is self.kept[-1]:\n"
        "                at = KvPosition(at.layer + 1, self.encoder.first_token)\n",
        "            at = KvPosition(at.layer, kept.first_token + kept.num_tokens)\n"
        "            if kept is self.kept[-1]:\n"
        "                at = KvPosition(at.layer + 1, self.encoder.first_token)\n"
        "            self.end = at\n",
        "tests/unit/test_prefill_job.py::test_what_is_found_while_kept_tiles_are_made_follows_them",
    ),
    Mutant(
        "one kept prompt's messages are all made before another's",
        "prefill_node/kept_maker.py",
        "key=lambda each: (each.place <= self._last_place, each.place)",
        "key=lambda each: each.place",
        _PREFILL_PREFIXES + "test_prompts_that_are_kept_take_turns",
    ),
    Mutant(
        "the thread of kept tiles outlives its loop",
        "prefill_node/prefill_loop.py",
        "        await self._kept.stop()\n",
        "",
        _PREFILL_PREFIXES + "test_the_thread_of_kept_tiles_ends_with_the_loop",
    ),
    Mutant(
        "what was cancelled is still made of kept tiles",
        "prefill_node/kept_maker.py",
        "and self.room_bytes > 0 and not self.cancelled.is_set():",
        "and self.room_bytes > 0:",
        "tests/unit/test_prefill_job.py::test_nothing_is_made_of_kept_tiles_once_their_job_is_given_up",
    ),
    Mutant(
        "a prompt's stream ends before the word behind it is there",
        "prefill_node/prefill_job.py",
        "        return KvPosition(self.end.layer - 1, 0)",
        "        return self.end",
        _PREFILL_PREFIXES + "test_what_is_kept_of_a_prompt_is_sent_before_the_engine_has_its_turn",
    ),
    Mutant(
        "a kept tile that cannot be sent leaves its reader waiting",
        "prefill_node/prefill_loop.py",
        "        elif error is not None:\n            self._remove(job)\n            job.fail(error)\n        else:\n"
        "            job.add_kept",
        "        elif error is None:\n            job.add_kept",
        _PREFILL_PREFIXES + "test_a_kept_tile_that_cannot_be_sent_ends_its_job_alone",
    ),
    Mutant(
        "attention behind a prefix does not see its keys",
        "prefill_node/prefill_run.py",
        "                self.k_KNE[:, first : first + kept.num_tokens] = k_KTE\n",
        "",
        "tests/numerics/test_prefix_runs.py::test_what_lies_behind_a_kept_prefix_has_the_bits_of_a_run_of_everything",
    ),
    Mutant(
        "what was read once is pushed out by what is new",
        "colm/segmented_lru.py",
        "return chain(self._on_probation, self._protected)",
        "return chain(self._protected, self._on_probation)",
        "tests/unit/test_segmented_lru.py::test_what_comes_once_pushes_out_nothing_that_was_wanted_again",
    ),
)
