"""Nodes run by hand take what the cluster's options say of them: the same names, defaults and words."""

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

import decode_node.__main__ as decode_command
import prefill_node.__main__ as prefill_command
from cluster.options import ClusterConfig, load_config
from decode_node.node import DecodeNode
from prefill_node.node import PrefillNode
from prefill_node.sparse.policy import SparsePolicy

COMMANDS = {"prefill": prefill_command.main, "decode": decode_command.main}
_SCALING = {"max_replicas", "scale_up_s", "scale_down_s", "target_queue_s", "target_use"}
OF_POOLS = {"replicas", "standby", "resource", "num_gpus"} | _SCALING
"""Options of how many nodes there are: a node knows nothing of them."""
OF_BORROWERS = {"max_queued", "max_streams"}
"""Options of [prefill] for those who borrow a prefill node: a decode node by hand takes them."""
REQUIRED = {"prefill": ("--model", "m"), "decode": ("--model", "m", "--prefill", "localhost:1")}


def flags(role: str) -> dict[str, Any]:
    app = typer.Typer()
    app.command()(COMMANDS[role])
    return {param.opts[0]: param for param in typer.main.get_command(app).params}


def expected() -> list[tuple[str, str, str, str]]:
    """(role, flag, section, option), for every option of the cluster that concerns a node."""
    config = ClusterConfig()
    found = [(role, "--dtype", "model", "dtype") for role in COMMANDS]
    for section in COMMANDS:
        for name in type(getattr(config, section)).model_fields:
            flag = "--" + name.replace("_", "-")
            if name in OF_POOLS:
                continue
            if name != "max_streams":
                found.append((section, flag, section, name))
            if section == "prefill" and name in OF_BORROWERS:
                found.append(("decode", "--prefill-" + flag[2:], section, name))
    return found


@pytest.mark.parametrize(("role", "flag", "section", "option"), expected())
def test_every_option_of_a_node_is_a_flag_of_its_command(role: str, flag: str, section: str, option: str) -> None:
    """Bug: most options of the cluster could not be given to a node by hand."""
    field = type(getattr(ClusterConfig(), section)).model_fields[option]
    param = flags(role)[flag]
    assert param.help == field.description
    if field.default is not None:
        assert str(field.default) in str(param.show_default)


def started(
    role: str, monkeypatch: pytest.MonkeyPatch, *words: str, model: str = "m"
) -> tuple[Result, PrefillNode | DecodeNode | None]:
    """The node that a command line would run."""
    nodes = []

    async def run_node(node: Any) -> None:
        nodes.append(node)

    module = {"prefill": prefill_command, "decode": decode_command}[role]
    monkeypatch.setattr(module, "run_node", run_node)
    app = typer.Typer()
    app.command()(COMMANDS[role])
    required = [model if word == "m" else word for word in REQUIRED[role]]
    result = CliRunner().invoke(app, [*required, *words])
    return result, nodes[0] if nodes else None


def test_flags_reach_a_prefill_node(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--sparse-keys-per-row", "4096", "--sparse-dense-below-tokens", "0", "--sparse-patterns", "p.json")
    words += ("--memory-bytes", "2GiB", "--max-queued", "3", "--max-queued-s", "7.5", "--tile-tokens", "100")
    words += ("--dtype", "float32", "--num-threads", "1", "--host", "::1", "--port", "7")
    result, node = started("prefill", monkeypatch, *words)
    assert result.exit_code == 0, result.output
    assert isinstance(node, PrefillNode)
    options = node._options
    settings = options.settings
    assert settings.sparse_policy == SparsePolicy(mass=None, keys_per_row=4096, dense_below_tokens=0)
    assert (settings.sparse_patterns, settings.memory_bytes) == (Path("p.json"), 2 << 30)
    assert (settings.max_queued, settings.max_queued_s, settings.tile_tokens) == (3, 7.5, 100)
    assert (options.placement.dtype, options.placement.num_threads) == (torch.float32, 1)
    assert (options.model_path, options.host, options.port) == ("m", "::1", 7)


def test_flags_reach_a_decode_node(monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "--kv-cache-bytes",
        "64MiB",
        "--page-tokens",
        "16",
        "--kv-cache-dtype",
        "int8",
        "--max-batch-size",
        "3",
        "--max-requests",
        "5",
    )
    words += ("--prefill-max-streams", "2", "--prefill-max-queued", "4", "--prefill", "localhost:2")
    result, node = started("decode", monkeypatch, *words)
    assert result.exit_code == 0, result.output
    assert isinstance(node, DecodeNode)
    settings, pool = node._options.settings, node._prefill_pool
    assert (settings.kv_cache_bytes, settings.page_tokens, settings.kv_cache_dtype) == (64 << 20, 16, "int8")
    assert (settings.max_batch_size, settings.max_requests) == (3, 5)
    assert (pool._max_streams, pool._line._max_waiting, len(pool._nodes)) == (2, 4, 2)  # type: ignore[attr-defined]


def test_without_flags_a_node_is_as_the_cluster_would_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _, node = started("prefill", monkeypatch)
    assert isinstance(node, PrefillNode)
    settings = node._options.settings
    section = load_config(None, {}).prefill
    assert settings.model_dump() == {name: getattr(section, name) for name in type(settings).model_fields}


BAD_FLAGS = {
    "no tile": ("prefill", ("--tile-tokens", "0"), "--tile-tokens='0'"),
    "a negative tile": ("prefill", ("--tile-tokens", "-3"), "--tile-tokens='-3'"),
    "a tile without end": ("prefill", ("--tile-tokens", "inf"), "--tile-tokens='inf'"),
    "nothing covered": ("prefill", ("--sparse-mass", "0"), "--sparse-mass=0.0 must be above 0"),
    "too few keys": ("prefill", ("--sparse-keys-per-row", "320"), "--sparse-keys-per-row=320 covers nothing"),
    "two budgets": (
        "prefill",
        ("--sparse-mass", "0.9", "--sparse-keys-per-row", "4096"),
        "--sparse-mass=0.9 and sparse_keys_per_row=4096",
    ),
    "not a size": ("decode", ("--kv-cache-bytes", "lots"), "--kv-cache-bytes='lots'"),
    "not a cache's dtype": ("decode", ("--kv-cache-dtype", "int4"), "--kv-cache-dtype='int4'"),
    "no stream": ("decode", ("--prefill-max-streams", "0"), "--prefill-max-streams='0'"),
    "not a device": ("decode", ("--device", "tpu"), "--device='tpu'"),
    "not a dtype": ("prefill", ("--dtype", "int4"), "--dtype='int4'"),
}


@pytest.mark.parametrize(("role", "words", "fragment"), BAD_FLAGS.values(), ids=BAD_FLAGS.keys())
def test_a_bad_flag_is_refused_by_name(
    role: str, words: tuple[str, ...], fragment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, node = started(role, monkeypatch, *words)
    assert (result.exit_code, node) == (1, None)
    assert f"error: {fragment}" in result.output
