"""Model files made to hang or fill a reader, or to lead it elsewhere: one typed error that names the file."""

import json
import os
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from colm.checkpoint import Checkpoint
from colm.convert import from_any
from colm.errors import CheckpointError, UnsupportedModel
from colm.text.chat_template import ChatTemplate
from colm.text.tokenizer_file import parse_tokenizer
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tokenizer

HEAD = b"GGUF" + struct.pack("<I", 3)
KEY = struct.pack("<Q", 1) + b"k"
ARRAY, STRING, UINT8 = 9, 8, 0

GGUFS = {
    "more tensors than bytes": HEAD + struct.pack("<QQ", 1 << 62, 0),
    "more keys than bytes": HEAD + struct.pack("<QQ", 0, 1 << 62),
    "an array without end": HEAD + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", ARRAY, UINT8, 1 << 40),
    "texts without end": HEAD + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", ARRAY, STRING, 1 << 40),
    "a text without end": HEAD + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IQ", STRING, (1 << 64) - 1),
    "arrays in arrays": HEAD + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", ARRAY, ARRAY, 1) + b"\0" * 64,
    "a type that is none": HEAD + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<I", 99) + b"\0" * 64,
    "many dimensions": HEAD + struct.pack("<QQ", 1, 0) + KEY + struct.pack("<I", 1 << 31) + b"\0" * 64,
    "a huge tensor": HEAD + struct.pack("<QQ", 1, 0) + KEY + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0),
    "nothing": b"",
}


@pytest.mark.parametrize("whole", GGUFS.values(), ids=GGUFS.keys())
def test_a_gguf_file_is_held_against_its_size(tmp_path: Path, whole: bytes) -> None:
    """Bug: a length that the file made up was counted to, and files of other types of errors came through."""
    (tmp_path / "m.gguf").write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"m\.gguf is truncated or not a GGUF file"):
        from_any(tmp_path / "m.gguf", tmp_path / "colm")


MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
}
CONFIGS = {
    "layers without end": (json.dumps(MODEL | {"num_hidden_layers": 4000}), r"too few for 4000 layers"),
    "a width of many digits": ('{"hidden_size": ' + "9" * 5000 + "}", r"not valid JSON"),
    "deep nesting": ("[" * 100_000, r"nested too deeply"),
    "no number": (json.dumps(MODEL | {"rms_norm_eps": "x"}), r"norm_eps='x' must be at least 0"),
    "NaN": (json.dumps(MODEL | {"rope_theta": float("nan")}), r"NaN is no JSON number"),
    "a theta beyond floats": (json.dumps(MODEL | {"rope_theta": 10**400}), r"rope_theta="),
    "a list for a number": (json.dumps(MODEL | {"num_attention_heads": [4], "head_dim": 10**9}), r"num_heads=\[4\]"),
}


@pytest.mark.parametrize(("text", "message"), CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_is_one_typed_error_that_names_the_field(tmp_path: Path, text: str, message: str) -> None:
    """Bug: `norm_eps = "x"` was imported and failed when it was served; a list of layers' names took minutes."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(text)
    save_file({"model.embed_tokens.weight": torch.zeros(320, 64)}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises((CheckpointError, UnsupportedModel), match=message):
        from_any(tmp_path / "hf", tmp_path / "colm")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "..", "", 5])
def test_a_shard_stays_in_its_folder(tmp_path: Path, shard: object) -> None:
    """Bug: an index could name any file of the machine."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(MODEL))
    index = {"weight_map": {"model.embed_tokens.weight": shard}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not a file's name"):
        from_any(tmp_path / "hf", tmp_path / "colm")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    """Bug: whoever opened it waited for a writer that never came."""
    checkpoint = tiny_checkpoint(tmp_path / "colm", tiny_config(), tokenizer=True)
    (checkpoint.path / name).unlink()
    os.mkfifo(checkpoint.path / name)
    with pytest.raises(CheckpointError, match="is not a plain file"):
        Checkpoint.open(checkpoint.path).tokenizer_json()


@pytest.mark.parametrize("place", ["vocabulary", "added token"])
def test_a_token_id_is_bounded(place: str) -> None:
    """Bug: the library made a table as long as the largest id, and ended the process for want of memory."""
    body = json.loads(tiny_tokenizer().to_str())
    if place == "vocabulary":
        body["model"]["vocab"]["a"] = (1 << 32) - 1
    else:
        body["added_tokens"][0]["id"] = (1 << 32) - 1
    with pytest.raises(CheckpointError, match=r"token id|added_tokens\.0\.id="):
        parse_tokenizer(json.dumps(body).encode())


def test_a_template_that_writes_no_text_is_refused_as_it_is_loaded() -> None:
    """Bug: half of a surrogate pair ended every request of the model in an internal error."""
    with pytest.raises(CheckpointError, match="surrogate"):
        ChatTemplate("{{ '\ud800' }}", {}, str, lambda: datetime(2026, 1, 1, tzinfo=UTC))
