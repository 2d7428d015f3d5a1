"""The head-of-line benchmark against nodes in this process, and its figures."""

import asyncio
import json
from pathlib import Path

import pytest

from bench.harness.suite import Options, arguments, run
from bench.harness.units import unit_of
from bench.head_of_line import case as case_module
from bench.head_of_line.case import HeadOfLineCase
from tests.gateway import cluster_in_this_process
from tests.tiny import tiny_checkpoint


async def test_every_way_to_come_is_measured_beside_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(case_module, "_LEAD_S", 0.0)
    checkpoint = tiny_checkpoint(tmp_path / "model")
    case = HeadOfLineCase(
        model=checkpoint.path, state_dir=tmp_path, document_tokens=500, lengths=[8, 16], num_shorts=3, load=0.5
    )
    options = arguments("bench.head_of_line", None).parse_args(["--rounds", "1", "--json"], namespace=Options())
    async with cluster_in_this_process(checkpoint, tmp_path):
        await asyncio.to_thread(run, [case], options)
    (entry,) = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]
    metrics = entry["metrics"]
    assert {"alone_tokens8_s", "alone_tokens16_s", "alone_document_s"} <= set(metrics)
    for loop in ("closed_loop", "open_loop"):
        for name in ("document_s", "p50_x", "p95_x", "document_x", "p95_of_bar_fraction", "document_of_bar_fraction"):
            assert metrics[f"{loop}_{name}"]["median"] > 0
            unit_of(f"{loop}_{name}")
