"""Of what benchmarks and reports say."""

from tests.mutation.mutant import Mutant

_SERVING = "tests/unit/test_bench_serving.py::"
_BENCH_ONE_PROCESS = "tests/unit/test_bench_one_process.py::"
_BENCH_PREFILL_SUITE = "tests/unit/test_bench_prefill_suite.py::"
_BENCH_PREFILL_SAMPLES = "tests/unit/test_bench_prefill_samples.py::"
_QUALITY = "tests/unit/test_bench_quality.py::"
_LOAD_CLIENT = "tests/unit/test_bench_load_client.py::"
_SERVING_RECORDS = "tests/unit/test_bench_serving_records.py::"
_DOCS = "tests/architecture/test_docs.py::"

MUTANTS = (
    Mutant(
        "a part of the tests that fails is forgotten",
        "tests/side_by_side.py",
        "return int(any(list(threads.map(follow, parts, processes))))",
        "return int(all(list(threads.map(follow, parts, processes))))",
        "tests/unit/test_side_by_side.py::test_a_failure_of_either_part_is_a_failure",
    ),
    Mutant(
        "vLLM's times are of refused requests too",
        "bench/serving/vllm.py",
        'for each in window.requests if each.outcome == "finished"]',
        "for each in window.requests]",
        _SERVING_RECORDS + "test_a_window_is_what_vllm_bench_serve_would_have_saved",
    ),
    Mutant(
        "a load client's counts are not held against the gateway's",
        "bench/load_client.py",
        "if (ours := counted.increase(metric)) != seen:",
        "if (ours := counted.increase(metric)) is None:",
        _LOAD_CLIENT + "test_what_fails_or_is_counted_otherwise_is_said",
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
    Mutant(
        "a request that is sent late has waited for less",
        "bench/serving/open_loop.py",
        "times_s.append(clock() - due_s)",
        "times_s.append(clock() - due_s - late_s)",
        _SERVING + "test_times_count_from_when_a_request_was_to_arrive_not_from_when_it_was_sent",
    ),
    Mutant(
        "refusals better the percentiles of the others",
        "bench/serving/outcome.py",
        "known = [math.inf if value is None else value for value in values]",
        "known = [value for value in values if value is not None]",
        _SERVING_RECORDS + "test_a_request_without_a_first_token_is_later_than_any_other",
    ),
    Mutant(
        "a request may be missing from a window's record",
        "bench/serving/record.py",
        "if len(self.requests) != self.load.num_requests:",
        "if False:",
        _SERVING_RECORDS + "test_a_record_comes_back_from_its_line_and_has_one_outcome_for_each_arrival",
    ),
    Mutant(
        "gaps between arrivals are exponential, whatever the burstiness",
        "bench/serving/arrivals.py",
        "return rng.gamma(burstiness, 1 / burstiness, count)",
        "return rng.exponential(1.0, count)",
        _SERVING + "test_both_generators_have_the_mean_and_the_variance_of_gamma_arrivals",
    ),
    Mutant(
        "a burst's requests arrive one by one",
        "bench/serving/trace.py",
        "np.repeat(moments, load.num_together)",
        "np.sort(rng.uniform(0, load.seconds, load.num_requests))",
        _SERVING + "test_as_many_requests_arrive_as_the_rate_says_and_none_outside_the_window",
    ),
    Mutant(
        "the reference server keeps the pages of who has finished",
        "bench/serving/one_process.py",
        "        self.pool.release(work.pages)\n",
        "",
        _BENCH_ONE_PROCESS + "test_one_process_answers_as_the_model_does_whatever_else_it_answers",
    ),
    Mutant(
        "the reference server makes no first token before it has read all prompts",
        "bench/serving/one_process.py",
        "        self._step([work])\n",
        "",
        _BENCH_ONE_PROCESS
        + "test_every_prompt_that_waits_goes_before_the_answers_and_has_its_first_token_before_the_next",
    ),
    Mutant(
        "the reference server takes the newest prompt first",
        "bench/serving/one_process.py",
        "self._waiting.append(work)",
        "self._waiting.appendleft(work)",
        _BENCH_ONE_PROCESS + "test_one_process_takes_prompts_in_the_order_in_which_they_came",
    ),
    Mutant(
        "an interval of 95% is one of 90%",
        "bench/quality/metrics.py",
        "tail = (1.0 - confidence) / 2.0",
        "tail = 1.0 - confidence",
        _QUALITY + "test_the_interval_is_clopper_and_pearsons",
    ),
    Mutant(
        "a divergence is taken the other way round",
        "bench/quality/divergence.py",
        "(baseline_QV.exp() * (baseline_QV - other_QV))",
        "(other_QV.exp() * (other_QV - baseline_QV))",
        "tests/unit/test_bench_kv_codec.py::test_the_divergence_is_kullback_and_leiblers_from_raw_to_int8",
    ),
    Mutant(
        "values are read in another order than they are made",
        "bench/quality/reordered.py",
        "values[layer][head // group]",
        "values[layer][head % num_kv_heads]",
        "tests/unit/test_bench_weights.py::test_a_reordered_model_computes_the_same_by_other_weights",
    ),
    Mutant(
        "the first tokens behind a prompt are scored in place of the last",
        "bench/quality/experiment.py",
        "[-NUM_SCORED:]",
        "[:NUM_SCORED]",
        _QUALITY + "test_a_dense_cell_reads_the_last_tokens_as_the_whole_model_does",
    ),
    Mutant(
        "facts take the room of the text's end",
        "bench/quality/text.py",
        "    stop = end - num_continued\n",
        "    stop = end - num_continued - sum(map(len, sentences))\n",
        _QUALITY + "test_facts_stand_between_paragraphs_at_even_depths",
    ),
    Mutant(
        "a modelled cell counts as run",
        "bench/prefill/suite.py",
        " and record.measured in modes",
        "",
        _BENCH_PREFILL_SUITE + "test_records_of_another_commit_or_a_model_stand_for_nothing",
    ),
    Mutant(
        "a tile of a long prompt's sample finds its weights in memory",
        "bench/prefill/sampling.py",
        "        self._layer.time(*self._bounds(0))\n        self._turns[tile]",
        "        self._turns[tile]",
        _BENCH_PREFILL_SAMPLES + "test_long_prompts_layers_take_turns_at_every_tile_behind_their_own_first",
    ),
    Mutant(
        "what groups took in truth does not count for those behind them",
        "bench/prefill/suite.py",
        "pace, left_s = taken_s / predicted_s, ends_s - self.clock()",
        "pace, left_s = 1.0, self.budget_s",
        _BENCH_PREFILL_SUITE + "test_a_group_that_takes_longer_than_predicted_leaves_less_for_those_behind_it",
    ),
    Mutant(
        "a sampled sparse layer attends to everything",
        "bench/prefill/layer.py",
        "attention = _dense if self._plan is None else partial(_sparse, self._plan)",
        "attention = _dense",
        _BENCH_PREFILL_SAMPLES + "test_a_sampled_sparse_tile_leaves_the_hidden_states_that_the_engine_computes",
    ),
    Mutant(
        "a calibration beside other work is taken for one of an idle machine",
        "bench/roofline/calibrate.py",
        "if (share := used_s / had_s) < UNDISTURBED:",
        "if (share := used_s / had_s) < 0:",
        "tests/unit/test_bench_roofline.py::test_a_calibration_says_that_others_used_the_machine",
    ),
    Mutant(
        "the host's time of a decode step is that of a prefill's",
        "bench/roofline/machine.py",
        "self.step_s if self.decode_step_s is None else self.decode_step_s",
        "self.step_s",
        "tests/unit/test_bench_roofline.py::test_a_decode_step_has_a_host_of_its_own_where_all_layers_run_in_one_call",
    ),
    Mutant(
        "a modelled stream has no window",
        "bench/roofline/model.py",
        "                computed_s = max(computed_s, arrived_s)\n",
        "",
        "tests/unit/test_bench_roofline.py::test_a_smaller_window_never_makes_a_stream_faster_and_an_empty_one_takes_turns",
    ),
    Mutant(
        "a modelled cell is compared with the paper",
        "bench/report/compare.py",
        'if self.ours is None or self.ours.measured == "modelled" or self.paper_speedup is None:',
        "if self.ours is None or self.paper_speedup is None:",
        "tests/unit/test_bench_report.py::test_modelled_cells_cells_not_run_and_cells_that_the_paper_has_wrong_are_not_judged",
    ),
    Mutant(
        "all tiles of one layer leave nothing open about the others",
        "bench/prefill/estimate.py",
        "(len(group) * num_layers)",
        "len(group)",
        _BENCH_PREFILL_SAMPLES + "test_all_tiles_of_one_layer_are_summed_and_the_other_layers_leave_an_error_bar",
    ),
    Mutant(
        "a switch costs what a prompt's first step takes",
        "bench/job_switch.py",
        "if number != before and place:",
        "if number != before:",
        "tests/unit/test_bench_job_switch.py::test_a_switch_costs_what_the_steps_behind_the_other_prompt_take_longer",
    ),
    Mutant(
        "a link to a heading that is gone passes",
        "bench/report/links.py",
        'if anchor and (file.suffix != ".md" or anchor not in anchors(file.read_text(encoding="utf-8"))):',
        'if anchor and file.suffix != ".md":',
        _DOCS + "test_a_link_that_leads_nowhere_is_named",
    ),
    Mutant(
        "of equal headings each has the first one's name",
        "bench/report/links.py",
        'f"{name}-{seen[name]}" if seen[name] else name',
        "name",
        _DOCS + "test_equal_headings_have_numbers",
    ),
    Mutant(
        "pages of a model that cases share are those of the last one",
        "bench/decode/loaded.py",
        "max(pages, self._num_pages.get(source, 0))",
        "pages",
        "tests/unit/test_bench_decode.py::test_pages_are_as_many_as_the_largest_case_of_a_model_and_one_model_is_held_at_a_time",
    ),
    Mutant(
        "attention is timed with the values' scales for both",
        "bench/decode/attention.py",
        'scales = (self.options.get("k_scales_BPK"), self.options.get("v_scales_BPK"))',
        'scales = (self.options.get("v_scales_BPK"), self.options.get("v_scales_BPK"))',
        "tests/unit/test_bench_decode.py::test_the_suite_has_every_way_of_a_step_batches_and_attention_and_says_why_a_peer_is_absent",
    ),
    Mutant(
        "a peer that is absent is not in the record",
        "bench/decode/__main__.py",
        'absent["llama.cpp"] = reason',
        'absent.pop("llama.cpp", reason)',
        "tests/unit/test_bench_decode.py::test_the_suite_has_every_way_of_a_step_batches_and_attention_and_says_why_a_peer_is_absent",
    ),
)
