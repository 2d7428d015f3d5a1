"""Every benchmark's cases, small, run from their checks to their record."""

import json

import pytest

from bench.harness.contest import Case
from bench.harness.suite import Options, arguments, run
from bench.harness.units import unit_of
from bench.kv_stream import StreamCase
from bench.load_by_scale import LoadCase
from bench.sampler import CHOICES, SamplerCase
from tests.tiny import tiny_config

CASES: list[Case] = [
    *(SamplerCase(choice=choice, logits="falling", num_rows=2, vocab_size=50) for choice in CHOICES),
    StreamCase(message_bytes=128 << 10, num_messages=3),
    LoadCase(model="tiny", config=tiny_config()),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_runs_to_its_record(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rounds", "1", "--json"]
    run([case], arguments("bench.suites", None).parse_args(words, namespace=Options()))
    (entry,) = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]
    assert entry["name"] == case.name
    assert entry["metrics"]
    for metric in entry["metrics"]:
        unit_of(metric)
