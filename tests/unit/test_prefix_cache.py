"""What is kept of prompts: found by prefix and salt alone, within a budget, and not let go while it is read."""

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from colm.kv import KvFormat, KvTile
from prefill_node.prefix_cache import PrefixCache, PrefixHold

FORMAT = KvFormat(num_layers=2, num_kv_heads=1, head_dim=1, dtype=torch.float64)
TILE_TOKENS = 4
BUDGET_TOKENS = 22


def token_ids_of(document: int, length: int) -> np.ndarray:
    """Documents often have the same tile behind other ones, and one tile twice."""
    tiles = np.random.default_rng(document).integers(0, 2, -(-length // TILE_TOKENS))
    return np.repeat(tiles, TILE_TOKENS)[:length]


def tile_of(salt: bytes, token_ids: np.ndarray, layer: int, first: int) -> KvTile:
    """What depends on the salt and on every id up to the tile's end."""
    last = min(first + TILE_TOKENS, len(token_ids))
    number = hash((salt, tuple(token_ids[:last]), layer)) % 1_000_003
    values = torch.full((1, last - first, 1), float(number))
    return KvTile(layer, first, values, -values)


DOCUMENTS = st.integers(0, 5)
LENGTHS = st.sampled_from([1, 3, 4, 5, 8, 11, 12, 30])
SALTS = st.sampled_from([b"", b"s"])


@dataclass(eq=False)
class Job:
    """A prompt, and what it has of the cache."""

    salt: bytes
    token_ids: np.ndarray
    hold: PrefixHold
    has_begun: bool = False
    computed: list[tuple[int, int]] = field(default_factory=list)

    def left(self) -> list[tuple[int, int]]:
        """Tiles that are still to be computed: (layer, first token)."""
        tiles = range(self.hold.num_cached_tokens, len(self.token_ids), TILE_TOKENS)
        return [(layer, first) for layer in range(FORMAT.num_layers) for first in tiles][len(self.computed) :]


class CacheMachine(RuleBasedStateMachine):
    """Jobs of few documents, of which several may run at once."""

    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        budget_bytes = BUDGET_TOKENS * FORMAT.token_bytes
        self.cache = PrefixCache(FORMAT, tile_tokens=TILE_TOKENS, budget_bytes=budget_bytes)
        self.open: list[Job] = []

    @rule(document=DOCUMENTS, length=LENGTHS, salt=SALTS)
    def serve(self, document: int, length: int, salt: bytes) -> None:
        compute(self.cache, token_ids_of(document, length), salt)

    @rule(target=jobs, document=DOCUMENTS, length=LENGTHS, salt=SALTS)
    def come(self, document: int, length: int, salt: bytes) -> Job:
        token_ids = token_ids_of(document, length)
        job = Job(salt, token_ids, self.cache.hold(token_ids, salt))
        self.open.append(job)
        self.check(job)
        return job

    @rule(job=jobs)
    def look_again(self, job: Job) -> None:
        if job in self.open and not job.has_begun:
            before = job.hold.num_cached_tokens
            assert self.cache.look_again(job.hold) == (job.hold.num_cached_tokens > before)
            self.check(job)

    @rule(job=jobs)
    def expect(self, job: Job) -> None:
        """What comes from elsewhere gets room, of a job that has not begun."""
        if job in self.open and not job.has_begun and not job.hold.filled:
            self.cache.expect(job.hold, len(job.token_ids) // TILE_TOKENS * TILE_TOKENS)

    @rule(job=jobs, num_tiles=st.integers(1, 3))
    def come_up(self, job: Job, num_tiles: int) -> None:
        for _ in range(num_tiles):
            if job in self.open and not job.has_begun and job.hold.filled:
                kept = job.hold.filled[0]
                tiles = [tile_of(job.salt, job.token_ids, each, kept.first_token) for each in range(FORMAT.num_layers)]
                kept.layers = [(tile.k_KTD, tile.v_KTD) for tile in tiles]
                self.cache.arrived(job.hold)
                assert job.hold.num_cached_tokens >= kept.first_token + kept.num_tokens

    @rule(job=jobs, is_alone=st.sampled_from([True, True, False]))
    def begin(self, job: Job, is_alone: bool) -> None:
        if job in self.open and not job.has_begun:
            job.has_begun = True
            self.cache.abandon(job.hold)
            self.cache.begin(job.hold, is_alone=is_alone)
            assert is_alone or not job.hold.filled

    @rule(job=jobs, num_tiles=st.integers(1, 20))
    def compute(self, job: Job, num_tiles: int) -> None:
        if job in self.open and job.has_begun:
            for place in job.left()[:num_tiles]:
                job.hold.keep(tile_of(job.salt, job.token_ids, *place))
                job.computed.append(place)

    @rule(job=jobs)
    def share_a_step(self, job: Job) -> None:
        if job in self.open and job.has_begun:
            self.cache.abandon(job.hold)

    @rule(job=consumes(jobs))
    def end(self, job: Job) -> None:
        """In the middle, or with all computed."""
        self.cache.close(job.hold)
        self.cache.close(job.hold)
        self.open.remove(job)

    def check(self, job: Job) -> None:
        assert job.hold.num_cached_tokens <= len(job.token_ids)
        for number, kept in enumerate(job.hold.read):
            for layer in range(FORMAT.num_layers):
                expected = tile_of(job.salt, job.token_ids, layer, number * TILE_TOKENS)
                found = kept.tile(layer)
                assert (found.layer, found.first_token) == (layer, number * TILE_TOKENS)
                assert all(
                    torch.equal(ours, right) for ours, right in zip(found.tensors, expected.tensors, strict=True)
                )

    @invariant()
    def adds_up(self) -> None:
        self.cache.check_integrity([job.hold for job in self.open])
        for job in self.open:
            self.check(job)


CacheMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestPrefixCache = CacheMachine.TestCase


def a_cache(num_tokens: int) -> PrefixCache:
    return PrefixCache(FORMAT, tile_tokens=TILE_TOKENS, budget_bytes=num_tokens * FORMAT.token_bytes)


def compute(cache: PrefixCache, token_ids: np.ndarray, salt: bytes = b"") -> int:
    """Serve a prompt; how many of its tokens were kept."""
    hold = cache.hold(token_ids, salt)
    cache.begin(hold, is_alone=True)
    num_cached = hold.num_cached_tokens
    for layer in range(FORMAT.num_layers):
        for first in range(num_cached, len(token_ids), TILE_TOKENS):
            hold.keep(tile_of(salt, token_ids, layer, first))
    cache.close(hold)
    return num_cached


def test_a_prompt_is_found_whole_and_one_that_begins_alike_up_to_the_last_whole_tile() -> None:
    cache, token_ids = a_cache(100), np.arange(10)
    assert compute(cache, token_ids) == 0
    assert compute(cache, token_ids) == 10
    assert compute(cache, np.append(token_ids, 1)) == 8
    assert compute(cache, token_ids[:9]) == 8
    assert compute(cache, np.append(token_ids[:7], 9)) == 4
    assert compute(cache, token_ids, b"another's") == 0
    assert (cache.counts.num_queried_tokens, cache.counts.num_hit_tokens) == (10 + 10 + 11 + 9 + 8 + 10, 30)


def test_a_tile_is_not_found_behind_another_prefix() -> None:
    cache = a_cache(100)
    first, second = np.repeat([0, 1], 4), np.repeat([2, 3], 4)
    for token_ids in (first, second):
        compute(cache, token_ids)
    assert compute(cache, np.append(first[:4], second[4:])) == 4


def test_what_a_job_reads_does_not_make_way() -> None:
    cache, document = a_cache(16), np.arange(8)
    compute(cache, document)
    reading = cache.hold(document, b"")
    for other in range(1, 5):
        compute(cache, np.arange(12) + 100 * other)
        cache.check_integrity([reading])
    assert cache.hold(document, b"").num_cached_tokens == 8


def test_a_document_loses_its_end_first() -> None:
    cache, document = a_cache(16), np.arange(12)
    compute(cache, document)
    compute(cache, np.arange(8) + 100)
    assert cache.counts.num_evicted_tiles == 1
    assert cache.hold(document, b"").num_cached_tokens == 8


def test_a_copy_is_kept_and_not_the_engines_own_memory() -> None:
    cache, token_ids = a_cache(100), token_ids_of(0, 4)
    hold = cache.hold(token_ids, b"")
    cache.begin(hold, is_alone=True)
    tiles = [tile_of(b"", token_ids, layer, 0) for layer in range(FORMAT.num_layers)]
    for tile in tiles:
        hold.keep(tile)
        tile.k_KTD.zero_()
    cache.close(hold)
    assert cache.hold(token_ids, b"").read[0].tile(0).k_KTD.all()


def test_documents_that_come_once_push_each_other_out_and_not_one_that_is_asked_about_again() -> None:
    cache, document = a_cache(20), np.arange(8)
    for _ in range(2):
        compute(cache, document)
    for other in range(1, 9):
        compute(cache, np.arange(12) + 100 * other)
    assert cache.counts.num_evicted_tiles > 0
    assert compute(cache, document) == 8


def test_the_beginning_of_a_prompt_that_does_not_fit_is_kept() -> None:
    cache, token_ids = a_cache(10), np.arange(30)
    compute(cache, token_ids)
    assert compute(cache, token_ids) == 8


def test_a_cache_without_memory_hashes_and_keeps_nothing() -> None:
    cache = a_cache(0)
    hold = cache.hold(token_ids_of(0, 10), b"")
    cache.begin(hold, is_alone=True)
    assert not hold.keys
    assert not hold.filled
    assert cache.counts.num_queried_tokens == 0
