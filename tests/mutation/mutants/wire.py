"""Of the wire: tiles, checksums, certificates, channels."""

from tests.mutation.mutant import Mutant

_WAITING = "tests/fault/test_waiting.py::"
_ROTATION = "tests/unit/test_authority_rotation.py::"
_GATEWAY = "tests/fault/test_gateway.py::"
_STREAM = "tests/fault/test_kv_stream_faults.py::"
_CHANNELS = "tests/unit/test_channels.py::"
_END = "tests/fault/test_end_of_prompt.py::"
_CODEC = "tests/contract/test_kv_codec.py::"

MUTANTS = (
    Mutant(
        "the end of a call that gRPC loses is lost",
        "colm/wire/call_end.py",
        "_Due(state.due - {OperationType.receive_message})",
        "_Due(state.due)",
        "tests/unit/test_call_end.py::test_a_reader_hears_the_status_although_the_end_of_its_reading_is_lost",
    ),
    Mutant(
        "bytes that are no message are the server's fault",
        "colm/wire/malformed.py",
        "        except DecodeError:\n            return Unreadable(",
        "        except DecodeError:\n            raise\n            return Unreadable(",
        "tests/unit/test_malformed.py::test_garbage_on_a_stream_is_an_invalid_argument",
    ),
    Mutant(
        "a call may stay silent for ever",
        "colm/wire/prompt_stream.py",
        "asyncio.timeout(OPEN_TIMEOUT_S)",
        "asyncio.timeout(None)",
        _WAITING + "test_a_call_that_never_says_what_it_wants_does_not_stay",
    ),
    Mutant(
        "a prompt that was cut off is served",
        "colm/wire/prompt_stream.py",
        '    raise InvalidRequest("end_of_prompt"',
        '    return\n    raise InvalidRequest("end_of_prompt"',
        _END + "test_a_side_that_is_closed_before_the_end_was_cut_off_and_starts_nothing",
    ),
    Mutant(
        "a prompt that was damaged on the way is computed",
        "colm/wire/prompt_stream.py",
        "    if checksum not in (None, ids_checksum(token_ids)):\n",
        "    if False:\n",
        "tests/contract/test_messages.py::test_ids_that_changed_on_the_way_are_told_from_those_that_were_sent",
    ),
    Mutant(
        "a damaged connection is kept",
        "colm/wire/channels.py",
        """        except (PeerUnavailable, PeerFailed):
            is_lost = True
            raise
        except (Unauthenticated, InvalidRequest) as err:
            if (found := _between_members(address, err)) is None:
                raise
            is_lost = True
            raise found from err
        finally:
            for channel in self._shelf.give_back(shared, is_lost=is_lost):
                await""",
        """        except PeerUnavailable:
            is_lost = True
            raise
        except (Unauthenticated, InvalidRequest) as err:
            if (found := _between_members(address, err)) is None:
                raise
            is_lost = True
            raise found from err
        finally:
            for channel in self._shelf.give_back(shared, is_lost=is_lost):
                await""",
        "tests/unit/test_channels.py::test_a_lost_channel_is_not_closed_under_its_other_users",
    ),
    Mutant(
        "work waits for the caller's half-close",
        "colm/wire/prompt_stream.py",
        """        if request.WhichOneof("part") == "end_of_prompt":
            return
""",
        """        if request.WhichOneof("part") == "end_of_prompt":
            async for _ in requests:
                pass
            return
""",
        _END + "test_the_whole_answer_comes_while_the_callers_side_stays_open",
    ),
    Mutant(
        "a damaged header is believed",
        "colm/wire/tile_codec.py",
        '    if header.HasField("header_checksum") and header.header_checksum != _header_checksum(header):\n',
        "    if False:\n",
        _STREAM + "test_a_spoilt_stream_is_fetched_again_and_the_answer_is_the_oracles",
    ),
    Mutant(
        "a damaged payload is stored",
        "colm/wire/tile_codec.py",
        "    if checksum != header.checksum:\n",
        "    if False:\n",
        _STREAM + "test_a_spoilt_stream_is_fetched_again_and_the_answer_is_the_oracles",
    ),
    Mutant(
        "a tile is read in whatever codec it comes",
        "colm/wire/kv_codec.py",
        "    if value != CODECS[wanted]:",
        "    if False:",
        _CODEC + "test_a_tile_in_another_codec_than_was_agreed_on_is_final",
    ),
    Mutant(
        "a codec that nobody knows ends the search",
        "colm/wire/kv_codec.py",
        "        if value in names:\n            return names[value]\n",
        "        return names[value]\n",
        _CODEC + "test_the_first_codec_that_the_node_knows_is_taken",
    ),
    Mutant(
        "int8 is sent of numbers that come back infinite",
        "colm/wire/kv_codec.py",
        "torch.finfo(dtype).max / LARGEST:",
        "torch.finfo(dtype).max:",
        _CODEC + "test_numbers_that_would_come_back_infinite_are_not_sent",
    ),
    Mutant(
        "a payload is checked where its writer can still change it",
        "decode_node/kv_store.py",
        "memoryview(bytes(payload)) if is_shared else payload",
        "payload",
        "tests/unit/test_kv_store.py::test_a_payload_that_changes_on_its_way_into_the_pages_is_stored_as_it_was",
    ),
    Mutant(
        "memory that could be shrunk is mapped",
        "colm/wire/shared_memory.py",
        "if (missing := _SEALS & ~fcntl.fcntl(fd, fcntl.F_GET_SEALS)) or",
        "if (missing := 0) or",
        "tests/unit/test_shared_memory.py::test_whatever_else_a_peer_names_is_not_opened",
    ),
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
    Mutant(
        "an upload may pause for ever",
        "colm/wire/prompt_stream.py",
        "asyncio.timeout(idle_s)",
        "asyncio.timeout(None)",
        _GATEWAY + "test_an_upload_that_falls_silent_does_not_keep_its_place",
    ),
    Mutant(
        "any member may call any other",
        "colm/wire/callers.py",
        "if self._name not in names:",
        "if False:",
        "tests/unit/test_mutual_tls.py::test_a_member_that_may_call_others_only_is_refused_before_any_work",
    ),
    Mutant(
        "a connection lets calls in after its certificate has expired",
        "colm/wire/callers.py",
        "if end <= self._now():",
        "if False:",
        "tests/unit/test_mutual_tls.py::test_a_connection_may_outlive_its_certificate_and_its_calls_may_not",
    ),
    Mutant(
        "nodes ask callers for no certificate",
        "colm/wire/security.py",
        "demands = served.caller_name is not None",
        "demands = False",
        "tests/unit/test_mutual_tls.py::test_whoever_has_no_certificate_that_calls_is_refused_before_any_call",
    ),
    Mutant(
        "messages are sealed without their number",
        "colm/wire/seal.py",
        "is_sealed(data, next(number))",
        "is_sealed(data, 0 * next(number))",
        "tests/contract/test_seal.py::test_a_message_that_is_lost_is_missed_and_one_that_comes_twice_or_too_early_is_noticed",
    ),
    Mutant(
        "a sealed call may leave the checksum out",
        "colm/wire/malformed.py",
        "lambda: is_sealed)",
        "lambda: False)",
        "tests/contract/test_seal.py::test_a_sealed_call_is_refused_as_damaged_without_a_checksum_and_answered_with_one",
    ),
    Mutant(
        "damage between members is the client's fault",
        "colm/wire/channels.py",
        '_NEVER_WRONG = {"end_of_prompt", "message", "part"}',
        "_NEVER_WRONG: set[str] = set()",
        "tests/unit/test_channels.py::test_a_refusal_of_what_was_not_sent_is_a_lost_peer",
    ),
    Mutant(
        "gRPC takes calls of unknown methods",
        "colm/wire/steady_server.py",
        "if method is not None:",
        "if True:",
        "tests/fault/test_hostile_names.py::test_a_call_of_any_name_is_refused_and_the_server_goes_on",
    ),
    Mutant(
        "a revoked certificate calls on",
        "colm/wire/callers.py",
        "if serial in self._revoked():",
        "if False:",
        _ROTATION + "test_a_revoked_member_is_refused_at_its_next_call_even_on_an_open_connection",
    ),
    Mutant(
        "a channel keeps certificates that were replaced",
        "colm/wire/channels.py",
        "key = address, security.current_tls",
        "key = address, None",
        "tests/unit/test_certificate_renewal.py::test_a_channel_is_kept_while_certificates_stay",
    ),
    Mutant(
        "a server keeps certificates that were replaced",
        "colm/wire/security.py",
        "if (now := source.current()) is served:",
        "if (now := source.current()):",
        "tests/unit/test_certificate_renewal.py::test_calls_go_on_while_both_sides_take_up_a_new_authority",
    ),
    Mutant(
        "a key serves with another's certificate",
        "colm/wire/certificates.py",
        "if pair.key.public_key() != pair.leaf.public_key():",
        "if False:",
        "tests/unit/test_certificates.py::test_an_own_certificate_that_cannot_serve_is_refused_by_file_and_reason",
    ),
    Mutant(
        "values that are not finite are sent",
        "colm/wire/tile_codec.py",
        "    if not is_finite:\n",
        "    if False:\n",
        "tests/fault/test_not_finite.py::test_a_tile_that_is_not_finite_is_not_sent",
    ),
    Mutant(
        "a tile of another place is written before it is refused",
        "decode_node/kv_receiver.py",
        "        self._ledger.require_next(arrival)\n",
        "",
        "tests/unit/test_kv_receiver.py::test_a_tile_that_must_not_come_next_touches_no_page",
    ),
    Mutant(
        "a payload counts before its checksum is compared",
        "decode_node/kv_receiver.py",
        "        require_intact(header, checksum)\n        self._ledger.admit(arrival)\n",
        "        self._ledger.admit(arrival)\n        require_intact(header, checksum)\n",
        "tests/unit/test_kv_receiver.py::test_a_damaged_payload_does_not_count_and_is_written_over",
    ),
    Mutant(
        "a tile with its payload is joined as a header",
        "prefill_node/job_stream.py",
        " or waiting.slot is None",
        "",
        "tests/unit/test_prefill_job.py::test_only_tiles_that_wait_in_memory_share_a_message",
    ),
    Mutant(
        "of several tiles in a message only the first is stored",
        "decode_node/kv_receiver.py",
        "for header in message.shared_tiles.tiles:",
        "for header in message.shared_tiles.tiles[:1]:",
        "tests/fault/test_shared_payloads.py::test_tiles_that_wait_share_a_message_and_any_of_them_may_be_spoilt",
    ),
    Mutant(
        "freed messages go back to the system",
        "colm/allocator.py",
        "(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES), (_M_TRIM_THRESHOLD, KEPT_BYTES)",
        "((_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES),)",
        "tests/unit/test_allocator.py::test_messages_that_were_freed_leave_their_pages_to_the_next_ones",
    ),
    Mutant(
        "values without the library may be anything",
        "colm/wire/payload.py",
        "all(is_finite(tensor) for tensor in tensors)",
        "is_finite(tensors[0])",
        "tests/numerics/test_kv_payload.py::test_a_value_that_is_not_finite_is_found_wherever_it_stands",
    ),
    Mutant(
        "a model that overflows is tried on every node",
        "colm/wire/status.py",
        "    (NotFinite, grpc.StatusCode.INTERNAL, _Kind.KIND_NOT_FINITE),\n",
        "",
        "tests/fault/test_not_finite.py::test_a_request_ends_at_the_tile_and_is_not_tried_again",
    ),
    Mutant(
        "an empty file is a token",
        "colm/wire/security.py",
        "    if not token:\n        raise ConfigError",
        "    if False:\n        raise ConfigError",
        "tests/unit/test_token_files.py::test_a_file_without_a_token_is_refused",
    ),
    Mutant(
        "a first write that is cancelled leaves its call without an end",
        "colm/wire/status.py",
        "        with _caller_may_be_gone():\n            await context.send_initial_metadata(())\n",
        "",
        "tests/contract/test_errors.py::test_a_call_whose_first_write_is_cancelled_ends_with_its_error",
    ),
)
