"""Mutants of what a prefill node keeps for later prompts, and of streams that begin at a token."""

from tests.mutation.mutant import Mutant

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
        "tests/unit/test_prefill_job.py::"
        "test_a_job_cannot_bring_again_what_it_has_forgotten_nor_another_prompt_attention_or_codec",
    ),
)
