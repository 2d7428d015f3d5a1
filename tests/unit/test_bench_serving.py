"""The benchmark of serving: arrivals and lengths from one seed, and what becomes of each request."""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.serving import __main__ as command
from bench.serving.arrivals import MIN_BURSTINESS
from bench.serving.open_loop import answer, send_all
from bench.serving.trace import Asked, Load, LogNormal, arrivals, check_lengths, text_for, trace
from bench.simulate.workload import Always, Workload
from colm.errors import CapacityExceeded, ColmError, ConfigError, DeadlineExceeded, InvalidRequest, PeerUnavailable
from colm.events import Event, Finished, FinishReason, Timings, Token
from colm.events import Usage as Used
from tests.serving_windows import LENGTHS, LOAD
from tests.tiny import tiny_checkpoint, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(count: int, rng: np.random.Generator) -> Any:
    return rng.integers(0, 300, count)


def test_gaps_between_poisson_arrivals_are_exponential() -> None:
    load = LOAD.model_copy(update={"rate_per_s": 20.0, "seconds": 200.0})
    times = arrivals(load, np.random.default_rng(1))
    assert len(times) == 4000
    gaps = np.sort(np.diff(times))
    seen = np.arange(1, len(gaps) + 1) / len(gaps)
    # Kolmogorov's distance; 1.63 / sqrt(n) is passed by 1 in 100 samples of the right distribution.
    assert np.abs(seen - (1 - np.exp(-20 * gaps))).max() < 1.63 / math.sqrt(len(gaps))


@pytest.mark.parametrize("burstiness", [0.2, 0.5, 1.0, 4.0])
def test_both_generators_have_the_mean_and_the_variance_of_gamma_arrivals(burstiness: float) -> None:
    """Of the shape k the mean is 1 and the variance 1/k, of a sample of N with deviations of sqrt(1 / (k N)) and
    sqrt((2 + 6/k) / N) of itself: 5 of them are passed by 1 in a million samples."""
    count = 20_000
    load = LOAD.model_copy(update={"rate_per_s": 20.0, "seconds": count / 20.0, "burstiness": burstiness})
    of_window = np.diff(arrivals(load, np.random.default_rng(1)))
    workload = Workload(
        rate_per_s=20.0, num_requests=count, prompts=Always(1), answers=Always(1), num_chains=1, max_context=8,
        burstiness=burstiness,
    )  # fmt: skip
    simulated = np.diff([request.at_s for request in workload.requests(seed=1)])
    for gaps_s in (of_window, simulated):
        gaps = 20.0 * gaps_s
        assert gaps.mean() == pytest.approx(1, abs=5 * math.sqrt(1 / (burstiness * count)))
        assert gaps.var() * burstiness == pytest.approx(1, abs=5 * math.sqrt((2 + 6 / burstiness) / count))


@given(
    st.sampled_from(["poisson", "bursts"]),
    st.floats(0.01, 50),
    st.floats(0.1, 100),
    st.integers(1, 7),
    st.sampled_from([MIN_BURSTINESS, 1.0, 30.0]),
    st.integers(0, 3),
)
def test_as_many_requests_arrive_as_the_rate_says_and_none_outside_the_window(
    pattern: str, rate_per_s: float, seconds: float, burst_size: int, burstiness: float, seed: int
) -> None:
    load = Load.model_validate(
        LOAD.model_dump()
        | {"pattern": pattern, "rate_per_s": rate_per_s, "seconds": seconds, "burst_size": burst_size}
        | {"burstiness": burstiness}
    )
    times = arrivals(load, np.random.default_rng(seed))
    together = burst_size if pattern == "bursts" else 1
    assert len(times) == load.num_requests
    assert abs(len(times) - rate_per_s * seconds) <= together
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] <= seconds
    assert all(len(set(times[first : first + together])) == 1 for first in range(0, len(times), together))


def test_lengths_have_the_median_and_the_spread_that_they_are_given() -> None:
    drawn = LogNormal(median=256, sigma=0.9, low=1, high=1 << 20).draw(20_000, np.random.default_rng(0))
    logs = np.log(drawn)
    assert np.median(drawn) == pytest.approx(256, rel=0.03)
    assert logs.std() == pytest.approx(0.9, rel=0.03)
    clipped = LogNormal(median=256, sigma=0.9, low=100, high=500).draw(1000, np.random.default_rng(0))
    assert (clipped.min(), clipped.max()) == (100, 500)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("256,0.9,32", "is not MEDIAN,SIGMA,LOW,HIGH"),
        ("0,0.9,32,64", "median"),
        ("9,-1,32,64", "sigma"),
        ("9,1,0,64", "low"),
        ("9,1,64,32", "low=64 is above high=32"),
        ("a,1,32,64", "median"),
    ],
)
def test_a_distribution_that_is_none_is_refused(text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parser().parse_args(["--documents", text])
    assert words in capsys.readouterr().err


def test_a_trace_depends_on_the_seed_alone_and_has_its_share_of_shared_prefixes() -> None:
    first, again, other = (trace(LOAD, noise, seed) for seed in ([3, 0], [3, 0], [3, 1]))
    assert [each.at_s for each in first] == [each.at_s for each in again] != [each.at_s for each in other]
    assert all(np.array_equal(one.token_ids_N, two.token_ids_N) for one, two in zip(first, again, strict=True))
    shared = [each for each in first if each.prefix is not None]
    assert len(shared) == round(0.3 * LOAD.num_requests)
    for each in first:
        assert LENGTHS.low <= len(each.token_ids_N) <= LENGTHS.high
        assert 1 <= each.max_new_tokens <= 8
    begins = {(each.prefix, *each.token_ids_N[:2].tolist()) for each in shared}
    assert len(begins) == len({each.prefix for each in shared})


def test_lengths_beyond_the_context_are_refused(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", tiny_config(max_context=64))
    with pytest.raises(ConfigError, match=r"--documents up to 60 .* make 68, beyond the model's context of 64; lower"):
        check_lengths(LOAD, checkpoint)


def test_a_model_with_a_tokenizer_reads_prose_and_one_without_reads_noise(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    ids = text_for(checkpoint)(1000, np.random.default_rng(0))
    assert 0 <= ids.min() <= ids.max() < checkpoint.config.vocab_size


def token(token_id: int = 7) -> Token:
    return Token(token_id=token_id, text="", logprob=0.0, num_chains=1)


FINISHED = Finished(
    reason=FinishReason.LENGTH,
    usage=Used(
        num_prompt_tokens=3,
        num_prefill_tokens=2,
        num_decode_prompt_tokens=1,
        num_new_tokens=3,
        kv_received_bytes=0,
        kv_effective_bytes=0,
        num_kv_streams=1,
    ),
    timings=Timings(queue_s=0.25, prefill_s=0.1, first_token_s=0.5, decode_s=0.2),
)
ASKED = Asked(at_s=1.0, token_ids_N=np.arange(3), max_new_tokens=3, prefix=None)


def scripted(*steps: Event | ColmError) -> Callable[[Asked], AsyncGenerator[Event]]:
    async def generate(_: Asked, /) -> AsyncGenerator[Event]:
        for step in steps:
            if isinstance(step, ColmError):
                raise step
            yield step

    return generate


async def test_times_count_from_when_a_request_was_to_arrive_not_from_when_it_was_sent() -> None:
    """A client that the system has held up would else leave out the wait that it was held up for."""
    clock = iter([103.0, 104.0, 104.5, 106.0, 107.0]).__next__
    found = await answer(scripted(token(), token(), token(), FINISHED), ASKED, 100.0, clock)
    assert (found.outcome, found.error, found.num_new_tokens) == ("finished", "", 3)
    assert (found.at_s, found.sent_late_s, found.ttft_s) == (1.0, 2.0, 3.0)
    assert (found.tpot_s, found.longest_gap_s, found.total_s, found.queue_s) == (1.0, 1.5, 6.0, 0.25)


@pytest.mark.parametrize(
    ("steps", "outcome", "num_new_tokens"),
    [
        ([CapacityExceeded("full")], "refused", 0),
        ([DeadlineExceeded("over")], "late", 0),
        ([token(), DeadlineExceeded("over")], "late", 1),
        ([token(), token(), PeerUnavailable("gone")], "failed", 2),
        ([InvalidRequest("token_ids", 7, "no")], "failed", 0),
        ([token()], "failed", 1),
        ([token(), FINISHED], "finished", 1),
    ],
)
async def test_every_end_is_one_outcome(steps: list[Event | ColmError], outcome: str, num_new_tokens: int) -> None:
    found = await answer(scripted(*steps), ASKED, 0.0, iter(range(2, 20)).__next__)
    assert (found.outcome, found.num_new_tokens) == (outcome, num_new_tokens)
    assert bool(found.error) == (outcome != "finished")
    assert (found.ttft_s is None) == (num_new_tokens == 0)
    assert (found.tpot_s is None) == (num_new_tokens < 2)


async def test_requests_are_sent_when_they_are_due_although_none_is_answered() -> None:
    waiting, all_here = 0, asyncio.Event()

    async def generate(_: Asked, /) -> AsyncGenerator[Event]:
        nonlocal waiting
        waiting += 1
        if waiting == 3:
            all_here.set()
        await all_here.wait()
        yield token()
        yield FINISHED

    ended: list[int] = []
    asked = [replace(ASKED, at_s=at_s) for at_s in (0.0, 0.0, 0.05)]
    async with asyncio.timeout(60):
        found = await send_all(generate, asked, lambda: ended.append(1))
    assert [each.outcome for each in found] == ["finished"] * 3
    assert [each.at_s for each in found] == [0.0, 0.0, 0.05]
    assert len(ended) == 3
