"""Answers whose prompts begin alike, over pages that they share, get to the bit what each gets alone."""

import pytest

from colm.sampling import SamplingParams
from decode_node.page_pool import PagePool
from tests.numerics.test_drafting import (
    AMPLE,
    DOCUMENTS,
    TILE_TOKENS,
    Ask,
    Batch,
    Member,
    Plain,
    engine_of,
    plain_engine,
    seen,
)


@pytest.mark.parametrize("at_first", ["here", "coming", "failed"])
def test_answers_over_shared_pages_draft_and_change_their_scale_beside_the_one_that_brought_them(at_first: str) -> None:
    """And go on when that has left in mid-draft."""
    document = DOCUMENTS[0][:37]  # ends inside a page
    batch = Batch(*engine_of("small"), 4, AMPLE, num_pages=32, max_idle_pages=32)

    def join(end: tuple[int, ...]) -> Member:
        sampling = SamplingParams(ignore_eos=True)
        prompt = (*document, *end)
        ask = Ask(prompt, 3, max_new_tokens=25, sampling=sampling, wishes=(3, 5), num_brought=len(prompt) - 1)
        member = batch.join(ask, drafts=True)
        assert member is not None
        return member

    def arrive(*, fails: bool = False) -> None:
        while batch.pages.arrivals:
            batch.pages.arrive(batch.pages.arrivals[0], fails=fails)

    def step(count: int) -> None:
        for _ in range(count):
            batch.begin()
            batch.end()

    if at_first == "failed":
        join((5,))
        arrive(fails=True)
    first = join((5,))
    if at_first != "coming":
        arrive()
        step(4)
    same, other = join((5,)), join((20, 9))
    arrive()
    assert batch.pages.num_found_tokens == len(document) + 2 * TILE_TOKENS
    step(3)
    same.wanted_chains = 2
    batch.begin()
    batch.leave(first)
    batch.end()
    other.wanted_chains = 2
    while batch.members:
        step(1)
    batch.pages.close()
    pool = PagePool(plain_engine("small")[1].num_pages)
    for member in (first, same, other):
        plain = Plain("small", member.ask, pool)
        plain.follow(member.tokens)
        assert seen(member.tokens) == seen(plain.tokens)
    for member in (same, other):
        assert {token.num_chains for token in member.tokens} == {2, 3}
        assert member.answer.num_accepted_tokens
