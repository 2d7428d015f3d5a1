"""A checkpoint on disk: complete or absent, with named errors, and with bytes that a prefill never touches."""

import ctypes
import json
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray

from colm.checkpoint import (
    Checkpoint,
    TextConfig,
    backbone_digest,
    load,
    prefill_tensor_names,
    save,
    verify_backbone,
)
from colm.errors import CheckpointError
from colm.kv import KvFormat, fingerprint
from colm.model import parameter_shapes
from colm.model.config import ChainConfig, RopeScaling
from prefill_node.engine import PrefillEngine
from tests.nodes import decode_node, prefill_node
from tests.tiny import (
    edit_json,
    flip_last_byte,
    random_tensors,
    tiny_checkpoint,
    tiny_config,
    tiny_tokenizer,
    without_digest,
)

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
SLACK_BYTES = 8 * MIB
"""Memory allowed beside the weights: neighbouring pages that a fault maps too, the allocator, code."""
READ_AHEAD_BYTES = 32 * MIB
"""More than any disk reads ahead around a touched page; 8 MiB has been seen."""


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    config = tiny_config()
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(config).items()}
    loaded = save(tmp_path / "model", config, tensors).tensors(tensors)
    assert all(torch.equal(bits(loaded[name]), bits(tensor)) for name, tensor in tensors.items())


def test_config_text_and_tokenizer_come_back(tmp_path: Path) -> None:
    config = tiny_config(rope_scaling=RopeScaling(kind="linear", factor=2.0), tie_embeddings=True)
    text = TextConfig(bos_token_id=1, eos_token_ids=(2, 7), add_bos=True, chat_template="{{ x }}")
    tokenizer_json = tiny_tokenizer().to_str().encode()
    save(tmp_path / "model", config, random_tensors(config), text=text, tokenizer_json=tokenizer_json)
    opened = Checkpoint.open(tmp_path / "model")
    assert (opened.config, opened.text) == (config, text)
    assert opened.tokenizer_path is not None
    assert opened.tokenizer_path.read_bytes() == tokenizer_json


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path: Path) -> None:
    """Bug: safetensors writes for the owner alone, so that a node of another user could not open its checkpoint."""
    before = os.umask(0o027)
    try:
        checkpoint = save(tmp_path / "model", tiny_config(), random_tensors(tiny_config()))
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in checkpoint.path.iterdir()} == {0o640}


def test_without_a_tokenizer_there_is_none(tmp_path: Path) -> None:
    assert tiny_checkpoint(tmp_path / "model").tokenizer_path is None


@pytest.mark.parametrize("num_chains", [1, 2, 3])
def test_load_builds_the_asked_chains_and_no_other(tmp_path: Path, num_chains: int) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    model = load(checkpoint.path, num_chains=num_chains)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert shapes == parameter_shapes(checkpoint.config, num_chains)


def test_loaded_weights_are_frozen_and_none_is_left_without_memory(tmp_path: Path) -> None:
    model = load(tiny_checkpoint(tmp_path / "model").path)
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())


def test_load_casts_to_the_asked_dtype(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    assert {parameter.dtype for parameter in checkpoint.load(dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert checkpoint.dtype() == torch.float32


def test_saving_replaces_an_older_checkpoint(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model", seed=1, tokenizer=True)
    newer = tiny_checkpoint(tmp_path / "model", seed=2)
    name = "layers.0.attention.wk.chain1"
    assert torch.equal(newer.tensors([name])[name], random_tensors(tiny_config(), seed=2)[name])
    assert newer.tokenizer_path is None
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert tiny_checkpoint(tmp_path / "model").config == tiny_config()


NON_FINITE = pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])


def spoilt(tensors: dict[str, torch.Tensor], name: str, value: float) -> dict[str, torch.Tensor]:
    """The same tensors, one number of one of them replaced."""
    tensors[name].view(-1)[-1] = value
    return tensors


@NON_FINITE
@pytest.mark.parametrize("name", ["embedding.chain1", "head.chain3"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, name: str, value: float) -> None:
    """Bug: they were, and answers were silence."""
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' holds NaN or infinities"):
        save(tmp_path / "model", tiny_config(), spoilt(random_tensors(tiny_config()), name, value))
    assert list(tmp_path.iterdir()) == []


@NON_FINITE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_another_tool_are_looked_at(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    checkpoint, name = tiny_checkpoint(tmp_path / "model"), "layers.0.ffn.up.chain2"
    tensors = spoilt(random_tensors(checkpoint.config), name, value)
    rewrite(checkpoint, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor '{name}' holds NaN or infinities"):
        checkpoint.require_finite(parameter_shapes(checkpoint.config))
    checkpoint.require_finite(prefill_tensor_names(checkpoint.config))


def test_what_save_has_looked_at_is_not_read_again_but_what_an_older_build_wrote_is(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    stored = checkpoint.stored_digest()
    assert stored is not None
    with safetensors.safe_open(checkpoint.weights_path, "pt") as file:
        (key,) = file.metadata()
    data = checkpoint.weights_path.read_bytes()
    # The last of the file's numbers becomes NaN.
    checkpoint.weights_path.write_bytes(data[:-4] + struct.pack("<f", float("nan")))
    checkpoint.require_finite(parameter_shapes(checkpoint.config))
    safetensors.torch.save_file(
        spoilt(random_tensors(checkpoint.config), "head.chain1", float("nan")),
        checkpoint.weights_path,
        {"backbone_sha256": stored},
    )
    assert key != "backbone_sha256"
    assert checkpoint.stored_digest() == stored
    with pytest.raises(CheckpointError, match=r"'head\.chain1' holds NaN"):
        checkpoint.require_finite(parameter_shapes(checkpoint.config))


async def test_no_node_starts_with_weights_that_are_not_finite(tmp_path: Path) -> None:
    """Bug: a prefill node sent NaN keys, and the answer was an error without a cause."""
    checkpoint, name = tiny_checkpoint(tmp_path / "model"), "layers.1.attention.wk.chain1"
    rewrite(checkpoint, spoilt(random_tensors(checkpoint.config), name, float("nan")))
    for node in (prefill_node(str(checkpoint.path)), decode_node(str(checkpoint.path), ["127.0.0.1:1"])):
        with pytest.raises(CheckpointError, match=f"tensor '{name}' holds NaN"):
            await node.__aenter__()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def without(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


BAD_SAVES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "missing": (lambda tensors: without(tensors, "layers.1.ffn.up.chain2"), "layers.1.ffn.up.chain2"),
    "missing of the backbone": (lambda tensors: without(tensors, "embedding.chain1"), "embedding.chain1"),
    "misshapen": (
        lambda tensors: tensors | {"layers.0.attention.wk.chain1": torch.zeros(2, 3)},
        "layers.0.attention.wk.chain1",
    ),
    "stranger": (lambda tensors: tensors | {"layers.0.attention.wk.chain2": torch.zeros(2)}, "wk.chain2"),
}


@pytest.mark.parametrize(("spoil", "name"), BAD_SAVES.values(), ids=BAD_SAVES.keys())
def test_a_failing_save_names_the_tensor_and_leaves_the_old_checkpoint(
    tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], name: str
) -> None:
    old = tiny_checkpoint(tmp_path / "model", seed=1)
    before = contents(old.path)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        save(old.path, tiny_config(), spoil(random_tensors(tiny_config(), seed=2)))
    assert contents(old.path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failing_first_save_leaves_nothing(tmp_path: Path) -> None:
    tensors = without(random_tensors(tiny_config()), "final_norm.chain1")
    with pytest.raises(CheckpointError):
        save(tmp_path / "model", tiny_config(), tensors)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_no_checkpoint_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="thesis exists and is not a checkpoint"):
        tiny_checkpoint(tmp_path / "thesis")
    assert contents(tmp_path / "thesis") == {"chapter1.tex": b"years of work"}


def test_a_directory_with_a_config_of_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    """Bug: any directory with a config.json, a Hugging Face model say, was taken for a checkpoint and deleted."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "llama" / "pytorch_model.bin").write_bytes(b"weights")
    with pytest.raises(CheckpointError, match="llama exists and is not a checkpoint"):
        tiny_checkpoint(tmp_path / "llama")
    assert set(contents(tmp_path / "llama")) == {"config.json", "pytorch_model.bin"}


def test_a_file_in_the_way_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("notes")
    with pytest.raises(CheckpointError, match="model exists and is not a checkpoint"):
        tiny_checkpoint(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "notes"


def rewrite(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    """Write other weights below an existing config, as a broken tool does."""
    safetensors.torch.save_file(tensors, checkpoint.weights_path)


def truncate(checkpoint: Checkpoint) -> None:
    with checkpoint.weights_path.open("r+b") as file:
        file.truncate(checkpoint.weights_path.stat().st_size // 2)


def edit_model(checkpoint: Checkpoint, **changes: Any) -> None:
    path = checkpoint.path / "config.json"
    body = json.loads(path.read_text())
    edit_json(path, model=body["model"] | changes)


DAMAGES: dict[str, tuple[Callable[[Checkpoint], object], str]] = {
    "truncated weights": (truncate, r"model\.safetensors is truncated"),
    "not safetensors": (lambda ck: ck.weights_path.write_bytes(b"{}"), r"model\.safetensors is truncated or not"),
    "no weights": (lambda ck: ck.weights_path.unlink(), r"model\.safetensors is missing"),
    "missing tensor": (
        lambda ck: rewrite(ck, without(random_tensors(ck.config), "layers.1.ffn.down.chain3")),
        r"model\.safetensors: tensor 'layers\.1\.ffn\.down\.chain3' is missing",
    ),
    "misshapen tensor": (
        lambda ck: rewrite(ck, random_tensors(ck.config) | {"head.chain2": torch.zeros(320, 5)}),
        r"model\.safetensors: tensor 'head\.chain2' has shape \(320, 5\), expected \(320, 32\)",
    ),
    "no config": (lambda ck: (ck.path / "config.json").unlink(), r"config\.json is missing; .*colm import"),
    "bad JSON": (lambda ck: (ck.path / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    "not text": (lambda ck: (ck.path / "config.json").write_bytes(b"\xff"), r"config\.json is not UTF-8"),
    "not an object": (lambda ck: (ck.path / "config.json").write_text("[]"), r"config\.json holds list, not an object"),
    "another format": (
        lambda ck: edit_json(ck.path / "config.json", format="gguf"),
        r"config\.json is not a colm-checkpoint; run `colm import",
    ),
    "another version": (
        lambda ck: edit_json(ck.path / "config.json", format_version=99),
        r"config\.json: format_version=99, this build reads 1",
    ),
    "no model section": (
        lambda ck: edit_json(ck.path / "config.json", model=None),
        r"config\.json: model must be an object",
    ),
    "impossible model": (lambda ck: edit_model(ck, num_heads=7), r"config\.json: chains=.*num_heads=7"),
    "unknown model field": (lambda ck: edit_model(ck, window=8), r"config\.json: unknown model fields \['window'\]"),
    "unknown text field": (
        lambda ck: edit_json(ck.path / "config.json", text={"language": "en"}),
        r"config\.json: .*'language'",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_refused_by_name(
    tmp_path: Path, damage: Callable[[Checkpoint], object], message: str
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(checkpoint.path)


def changed(directory: Path, config: ChainConfig, names: set[str]) -> Checkpoint:
    """The tiny model with one number of each of these tensors changed to the next float."""
    tensors = random_tensors(config)
    for name in names:
        first = tensors[name].view(-1)[:1]
        first.copy_(torch.nextafter(first, torch.tensor([torch.inf])))
    return save(directory, config, tensors)


def test_the_backbone_digest_ignores_whatever_a_prefill_does_not_read(tmp_path: Path) -> None:
    config = tiny_config()
    others = set(parameter_shapes(config)) - prefill_tensor_names(config)
    assert {"final_norm.chain1", "head.chain1", "layers.0.attention.wq.chain2", "layers.1.ffn.up.chain1"} <= others
    original, other = tiny_checkpoint(tmp_path / "a"), changed(tmp_path / "b", config, others)
    assert backbone_digest(original) == backbone_digest(other)


@pytest.mark.parametrize("name", sorted(prefill_tensor_names(tiny_config())))
def test_the_backbone_digest_sees_the_last_bit_of(tmp_path: Path, name: str) -> None:
    config = tiny_config()
    assert backbone_digest(changed(tmp_path / "b", config, {name})) != backbone_digest(tiny_checkpoint(tmp_path / "a"))


def test_the_digest_stored_is_the_one_that_the_weights_have(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    stored = checkpoint.stored_digest()
    older = without_digest(checkpoint)
    assert older.stored_digest() is None
    assert backbone_digest(older) == stored


def test_a_stored_digest_is_read_without_the_weights_and_verified_with_them(tmp_path: Path) -> None:
    """Bug: every node read all of chain 1 before it started."""
    checkpoint = tiny_checkpoint(tmp_path / "model")
    verify_backbone(checkpoint)
    stored = backbone_digest(checkpoint)
    flip_last_byte(checkpoint, "embedding.chain1")
    assert backbone_digest(checkpoint) == stored
    with pytest.raises(CheckpointError, match="do not match the digest"):
        verify_backbone(checkpoint)


def test_other_weights_below_an_old_config_take_the_digest_with_them(tmp_path: Path) -> None:
    checkpoint, other = tiny_checkpoint(tmp_path / "a"), tiny_checkpoint(tmp_path / "b", seed=9)
    checkpoint.weights_path.write_bytes(other.weights_path.read_bytes())
    assert backbone_digest(checkpoint) == backbone_digest(other)
    rewrite(checkpoint, random_tensors(tiny_config(), seed=7))
    assert backbone_digest(checkpoint) == backbone_digest(tiny_checkpoint(tmp_path / "c", seed=7))


def test_the_fingerprint_changes_where_the_config_is_edited_to_read_fewer_of_the_same_tensors(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    edit_model(checkpoint, activation="gelu")
    edited = Checkpoint.open(checkpoint.path)
    assert edited.stored_digest() == checkpoint.stored_digest()
    assert fingerprint_of(edited) != fingerprint_of(checkpoint)


def test_a_prefill_needs_chain_1_without_head_and_the_last_layer_only_up_to_its_keys_and_values() -> None:
    config = tiny_config()
    names = prefill_tensor_names(config)
    assert all(name.endswith(".chain1") for name in names)
    assert {name for name in names if name.startswith("layers.1.")} == {
        "layers.1.attention_norm.chain1",
        "layers.1.attention.wk.chain1",
        "layers.1.attention.wv.chain1",
    }
    first_layer = {name for name in parameter_shapes(config, 1) if name.startswith("layers.0.")}
    assert names - {name for name in names if name.startswith("layers.1.")} == first_layer | {"embedding.chain1"}


def fingerprint_of(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> str:
    return fingerprint(checkpoint, KvFormat.of(checkpoint.config, dtype))


def test_the_fingerprint_ignores_later_chains_final_norm_and_head(tmp_path: Path) -> None:
    config = tiny_config()
    wider = tiny_config(chains=(4, 2, 2, 4))
    narrow, wide = tiny_checkpoint(tmp_path / "a"), save(tmp_path / "b", wider, grown(config, wider))
    assert fingerprint_of(narrow) == fingerprint_of(wide)


def grown(config: ChainConfig, wider: ChainConfig) -> dict[str, torch.Tensor]:
    """A larger model with chain 1 of the given one; everything else differs."""
    kept = {name: tensor for name, tensor in random_tensors(config).items() if name in prefill_tensor_names(config)}
    return random_tensors(wider, seed=9) | kept


FACTS: dict[str, dict[str, Any]] = {
    "rope theta": {"rope_theta": 20_000.0},
    "rope scaling": {"rope_scaling": RopeScaling(kind="linear", factor=2.0)},
    "norm epsilon": {"norm_eps": 1e-6},
}

YARN = RopeScaling(kind="yarn", factor=4.0)
SCALINGS: dict[str, dict[str, Any]] = {
    "factor": {"factor": 8.0},
    "original context": {"original_max_context": 64},
    "fast beta": {"beta_fast": 16.0},
    "slow beta": {"beta_slow": 2.0},
    "truncation": {"truncate": False},
    "attention factor": {"attention_factor": 1.5},
}


@pytest.mark.parametrize("change", FACTS.values(), ids=FACTS.keys())
def test_the_fingerprint_changes_with(tmp_path: Path, change: dict[str, Any]) -> None:
    original, other = tiny_checkpoint(tmp_path / "a"), tiny_checkpoint(tmp_path / "b", tiny_config(**change))
    assert fingerprint_of(original) != fingerprint_of(other)


@pytest.mark.parametrize("change", SCALINGS.values(), ids=SCALINGS.keys())
def test_the_fingerprint_changes_with_all_that_yarn_keys_depend_on(tmp_path: Path, change: dict[str, Any]) -> None:
    original = tiny_checkpoint(tmp_path / "a", tiny_config(rope_scaling=YARN))
    other = tiny_checkpoint(tmp_path / "b", tiny_config(rope_scaling=replace(YARN, **change)))
    assert fingerprint_of(original) != fingerprint_of(other)


def test_the_fingerprint_changes_with_the_last_bit_of_a_chain_1_weight(tmp_path: Path) -> None:
    original = tiny_checkpoint(tmp_path / "a")
    other = changed(tmp_path / "b", original.config, {"layers.0.ffn.down.chain1"})
    assert fingerprint_of(original) != fingerprint_of(other)


def test_the_fingerprint_changes_with_the_dtype(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    assert fingerprint_of(checkpoint) != fingerprint_of(checkpoint, torch.bfloat16)


def test_a_prefill_engine_never_touches_a_later_chains_bytes(tmp_path: Path) -> None:
    """A fresh process runs a prompt over weights that are not in memory. It then asks the kernel which bytes are: by
    the mapping (smaps), by the process's memory, and by the page cache (mincore).
    """
    config = tiny_config(chains=(2, 14), dim=4096, hidden_dim=16384, num_kv_heads=2, vocab_size=2048)
    checkpoint = sparse_checkpoint(tmp_path / "model", config)
    sizes = {name: 4 * shape.numel() for name, shape in parameter_shapes(config).items()}
    needed = prefill_tensor_names(config)
    needed_bytes = sum(sizes[name] for name in needed)
    assert sum(sizes.values()) > 64 * needed_bytes

    call = [sys.executable, "-c", "from tests.unit.test_checkpoint import observe_prefill as run; run()"]
    done = subprocess.run([*call, str(checkpoint.path)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)

    assert seen["cached_before_bytes"] < MIB
    assert needed_bytes / 2 < seen["mapped_resident_bytes"] <= needed_bytes + SLACK_BYTES
    assert seen["resident_growth_bytes"] <= needed_bytes + SLACK_BYTES
    shares = seen["cached_shares"]
    assert {name for name in shares if name.endswith(".chain2")} >= {
        f"layers.{layer}.{part}.chain2" for layer in (0, 1) for part in ("ffn.down", "ffn.gate", "ffn.up")
    }
    assert {name: share for name, share in shares.items() if name.endswith(".chain2") and share > 0} == {}
    assert {name for name in needed & shares.keys() if shares[name] < 1} <= {"embedding.chain1"}


def sparse_checkpoint(path: Path, config: ChainConfig) -> Checkpoint:
    """A checkpoint of zeros that takes no room: its weights are a hole in the file."""
    tiny_checkpoint(path)
    edit_json(path / "config.json", model=config.to_dict())
    header, offset = {}, 0
    for name, shape in sorted(parameter_shapes(config).items()):
        stop = offset + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    weights = path / "model.safetensors"
    weights.unlink()
    weights.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(weights, 8 + len(text) + offset)
    return Checkpoint.open(path)


def observe_prefill() -> None:
    """The body of the process above: prefill one prompt and print, as JSON, which weights are in memory."""
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(sys.argv[1])
    kv_format = KvFormat.of(checkpoint.config, torch.float32)
    token_ids = np.arange(64, dtype=np.int64)
    warm_up(checkpoint.path.parent / "warm")
    drop_from_page_cache(checkpoint.weights_path)
    cached_before_bytes = int(cached_pages(checkpoint.weights_path).sum()) * mmap.PAGESIZE
    resident_before = psutil.Process().memory_info().rss

    engine = PrefillEngine(checkpoint, kv_format, tile_tokens=32)
    num_tiles = sum(1 for _ in engine.run(token_ids))
    assert num_tiles == 2 * checkpoint.config.num_layers

    report = {
        "cached_before_bytes": cached_before_bytes,
        "mapped_resident_bytes": resident_bytes_of_mapping(checkpoint.weights_path),
        "resident_growth_bytes": psutil.Process().memory_info().rss - resident_before,
        "cached_shares": cached_shares(checkpoint.weights_path),
    }
    sys.stdout.write(json.dumps(report))


def warm_up(directory: Path) -> None:
    """Let libraries make their one-time allocations."""
    small = tiny_checkpoint(directory)
    kv_format = KvFormat.of(small.config, torch.float32)
    list(PrefillEngine(small, kv_format, tile_tokens=32).run(np.arange(40, dtype=np.int64)))


def drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_pages(path: Path) -> NDArray[np.bool_]:
    """For each page of a file, whether the page cache holds it."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        first_byte = ctypes.c_char.from_buffer(mapped)
        flags = np.zeros(-(-len(mapped) // mmap.PAGESIZE), dtype=np.uint8)
        vector = flags.ctypes.data_as(ctypes.POINTER(ctypes.c_ubyte))
        address = ctypes.c_void_p(ctypes.addressof(first_byte))
        failed = libc.mincore(address, ctypes.c_size_t(len(mapped)), vector)
        del first_byte
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
    return (flags & 1).astype(bool)


def cached_shares(path: Path) -> dict[str, float]:
    """Share of each tensor's pages in the page cache.

    The kernel reads ahead around a touched page. So in later chains only bytes that lie `READ_AHEAD_BYTES` inside a
    tensor count, and smaller tensors are left out.
    """
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    cached, shares = cached_pages(path), {}
    for name, entry in header.items():
        start, stop = (8 + header_bytes + offset for offset in entry["data_offsets"])
        margin = 0 if name.endswith(".chain1") else READ_AHEAD_BYTES
        first, last = -(-(start + margin) // mmap.PAGESIZE), (stop - margin) // mmap.PAGESIZE
        if first < last:
            shares[name] = float(cached[first:last].mean())
    return shares


def resident_bytes_of_mapping(path: Path) -> int:
    """Resident bytes of every mapping of a file in this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and key == "Rss:":
            total += int(rest[0]) * 1024
    return total
