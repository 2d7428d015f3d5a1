"""Every benchmark's cases, small, run from their checks to their record."""

import json
from dataclasses import replace

import pytest
import torch

from bench.certificates import BytesCase, ConnectionsCase
from bench.harness.contest import Case
from bench.harness.suite import Options, arguments, run
from bench.harness.units import unit_of
from bench.head_of_line.packing import PackingCase, WaitingCase
from bench.job_switch import JobSwitchCase
from bench.kernels.common import KernelCase
from bench.kernels.decode import DecodeCase
from bench.kernels.linear import LinearCase
from bench.kernels.prefill import PrefillCase
from bench.kernels.small import SMALL_CASES
from bench.kernels.sparse import SparseCase
from bench.kernels.staircase import StaircaseCase
from bench.kv_stream.codec import StreamCase
from bench.kv_stream.transports import TransportCase
from bench.load_by_scale import LoadCase
from bench.sampler import CHOICES, SamplerCase
from tests.library import needs_library
from tests.tiny import tiny_config

PREFILL = PrefillCase(num_queries=512, num_keys=1024, num_heads=8, num_kv_heads=2, head_dim=64)
PACKING = {"dtype": torch.float32, "tile_tokens": 64, "num_prompts": 5, "num_tokens": 20}
PACKING |= {"model": "tiny", "config": tiny_config()}
CASES: list[Case] = [
    PREFILL,
    replace(PREFILL, dtype=torch.float32),
    SparseCase(dense=PREFILL, pattern="blocks", density=0.5),
    SparseCase(dense=PREFILL, pattern="vertical_slash", density=0.5),
    DecodeCase(batch=2, context_len=64, num_kv_heads=2, group=4, head_dim=64),
    DecodeCase(batch=1, context_len=64, num_kv_heads=2, group=1, head_dim=64, num_queries=3, int8_pages=True),
    LinearCase(num_rows=4, out_dim=4096, in_dim=4096),
    *(StaircaseCase(num_rows=16, dim=64, chains=(2, 1, 1), backward=backward) for backward in (False, True)),
    *(case for case in SMALL_CASES if case.num_rows == 1),
    *(SamplerCase(choice=choice, logits="falling", num_rows=2, vocab_size=50) for choice in CHOICES),
    PackingCase(**PACKING),
    WaitingCase(**PACKING),
    JobSwitchCase(model="tiny", config=tiny_config(), dtype=torch.float32, tile_tokens=16, num_tokens=40),
]
OF_CONNECTIONS: list[Case] = [ConnectionsCase(num_connections=2), BytesCase(num_mib=1)]
OF_PROCESSES: list[Case] = [
    TransportCase(num_tokens=100, raw_message_bytes=(64 << 10,)),
    StreamCase(message_bytes=128 << 10, num_messages=3),
    LoadCase(model="tiny", config=tiny_config(chains=(4, 2))),
]


@pytest.mark.parametrize("case", CASES + OF_CONNECTIONS, ids=lambda case: case.name)
def test_a_case_runs_to_its_record(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rounds", "1", "--json"]
    run([case], arguments("bench.suites", None).parse_args(words, namespace=Options()))
    (entry,) = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]
    assert entry["name"] == case.name
    assert entry["metrics"]
    for metric in entry["metrics"]:
        unit_of(metric)


@pytest.mark.parametrize("case", OF_PROCESSES, ids=lambda case: case.name)
def test_each_turn_of_a_case_that_starts_processes_runs(case: Case) -> None:
    """Once: a process takes seconds to start."""
    with case.contest(0) as contest:
        contest.check()
        turns = {name: run() for name, run in contest.contenders.items()}
    assert len(turns) > 1
    for seen in turns.values():
        assert all(value > 0 for value in seen.values())
        for metric in seen:
            unit_of(metric)
    assert not contest.against or all(contest.compared_by in seen for seen in turns.values())


@needs_library
@pytest.mark.parametrize("case", [case for case in CASES if isinstance(case, KernelCase)], ids=lambda case: case.name)
def test_a_kernel_is_compared_on_every_machine_that_has_the_library(case: KernelCase) -> None:
    """A default variant that is timed under another's name, as avx512_bf16 is for fp32, still has its ratios."""
    with case.contest(0) as contest:
        assert contest.ours is not None
        assert contest.against
