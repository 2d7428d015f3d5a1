"""The benchmark of the first token, against nodes in this process."""

import asyncio
import json
from pathlib import Path

import pytest
import torch

from bench.first_token import BAR_S, BAR_X, FirstTokenCase
from bench.harness.suite import Options, arguments, run
from colm.defaults import MAX_LOCAL_PREFILL_TOKENS
from tests.gateway import cluster_in_this_process
from tests.tiny import tiny_checkpoint


async def test_lengths_are_asked_of_the_cluster_beside_what_computes_them_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    short, longer = 16, MAX_LOCAL_PREFILL_TOKENS + 1
    case = FirstTokenCase(model=checkpoint.path, state_dir=tmp_path, lengths=[short, longer], dtype=torch.float32)
    options = arguments("bench.first_token", None).parse_args(["--rounds", "1", "--json"], namespace=Options())
    async with cluster_in_this_process(checkpoint, tmp_path):
        await asyncio.to_thread(run, [case], options)
    (entry,) = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]
    seen = {name: metric["median"] for name, metric in entry["metrics"].items()}
    assert seen["decode_engine_tokens16_s"] > 0
    assert f"decode_engine_tokens{longer}_s" not in seen, "a prefill node computes it"
    assert seen["cluster_connect_s"] > 0
    bars_s = {short: BAR_S, longer: BAR_X * seen[f"prefill_engine_tokens{longer}_s"] + BAR_S}
    for length, bar_s in bars_s.items():
        cluster_s = seen[f"cluster_tokens{length}_s"]
        assert 0 < seen[f"cluster_tokens{length}_decode_node_s"] < cluster_s
        assert seen[f"cluster_tokens{length}_of_bar_fraction"] == pytest.approx(cluster_s / bar_s, rel=1e-3)
    assert 0 < seen[f"cluster_tokens{longer}_provisional_s"] < seen[f"cluster_tokens{longer}_behind_provisional_s"]
    assert f"cluster_tokens{short}_provisional_s" not in seen, "the decode node reads it"
