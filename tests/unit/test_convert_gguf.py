"""Import of GGUF files written here: dequantisation, the rotary order of rows, metadata, refusals."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from colm.convert import from_any, from_gguf
from colm.errors import CheckpointError, UnsupportedModel
from colm.model.config import ChainConfig, RopeScaling
from colm.model.rope import inverse_frequencies
from tests.tiny import CHAT_TEMPLATE, MERGES, random_tensors, tiny_config, tiny_tokenizer

NAMES = {
    "embedding": "token_embd",
    "attention_norm": "attn_norm",
    "wq": "attn_q",
    "wk": "attn_k",
    "wv": "attn_v",
    "wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "final_norm": "output_norm",
    "head": "output",
}

pytestmark = pytest.mark.filterwarnings("ignore:.*serves token ids only")


def gguf_name(ours: str) -> str:
    parts = ours.split(".")
    layer = f"blk.{parts[1]}." if parts[0] == "layers" else ""
    return f"{layer}{NAMES[parts[-2]]}.weight"


def interleaved_rows(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp's order, row by row: plane j's two features, j and j + D/2, become neighbours."""
    head_dim = weight.shape[0] // num_heads
    rows = [
        head * head_dim + plane + half * head_dim // 2
        for head in range(num_heads)
        for plane in range(head_dim // 2)
        for half in range(2)
    ]
    return weight[rows]


def write_gguf(
    path: Path,
    config: ChainConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    kind: Type = Type.F32,
    extra: Mapping[str, torch.Tensor] | None = None,
    arch: str = "llama",
    tokenizer: bool = False,
    **metadata: Any,
) -> Path:
    """Write a model as llama.cpp's converter lays it out: matrices as `kind`, gains in float32."""
    writer = gguf.GGUFWriter(path, arch)
    values = {
        "context_length": config.max_context,
        "embedding_length": config.dim,
        "block_count": config.num_layers,
        "feed_forward_length": config.hidden_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "rope.freq_base": config.rope_theta,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
    }
    if config.explicit_head_dim is not None:
        values |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    for key, value in ({f"llama.{key}": value for key, value in values.items()} | metadata).items():
        add(writer, key, value)
    if tokenizer:
        write_tokenizer(writer)
    for name, tensor in tensors.items():
        if ".wq." in name or ".wk." in name:
            tensor = interleaved_rows(tensor, config.num_heads if ".wq." in name else config.num_kv_heads)
        stored = kind if tensor.dim() > 1 else Type.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(tensor.numpy(), stored), raw_dtype=stored)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        bool: writer.add_bool,
    }
    adders.get(type(value), writer.add_array)(key, value)


def write_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = tiny_tokenizer()
    tokens = [tokenizer.id_to_token(token_id) for token_id in range(tokenizer.get_vocab_size())]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)


def on_the_grid(tensor: torch.Tensor, kind: Type) -> torch.Tensor:
    """Values that the type holds exactly: each block of 32 has the type's whole range of codes, scaled."""
    if tensor.dim() == 1 or kind in (Type.F32, Type.F16, Type.BF16):
        return tensor.bfloat16().float() if kind == Type.BF16 else tensor.half().float()
    low, high, offset = {Type.Q8_0: (-127, 127, 0.0), Type.Q4_0: (-8, 7, 0.0), Type.Q4_1: (0, 15, -0.25)}[kind]
    generator = torch.Generator().manual_seed(tensor.numel())
    blocks = torch.randint(low, high + 1, (tensor.numel() // 32, 32), generator=generator).float()
    blocks[:, 5], blocks[:, 9] = low, high
    return (blocks / 64 + offset).reshape(tensor.shape)


@pytest.fixture
def config() -> ChainConfig:
    return tiny_config(chains=(4,))


@pytest.fixture
def tensors(config: ChainConfig) -> dict[str, torch.Tensor]:
    return random_tensors(config)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1])
def test_every_tensor_type_is_read_exactly_and_rows_are_put_back(tmp_path, config, tensors, kind):
    exact = {name: on_the_grid(tensor, kind) for name, tensor in tensors.items()}
    source = write_gguf(tmp_path / "model.gguf", config, exact, kind=kind)
    found = from_gguf(source, tmp_path / "colm", dtype=torch.float32).tensors(exact)
    for name in exact:
        assert torch.equal(found[name], exact[name]), name


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Type.F32, torch.float32),
        (Type.F16, torch.float16),
        (Type.BF16, torch.bfloat16),
        (Type.Q8_0, torch.bfloat16),
    ],
)
def test_dtype_follows_the_matrices_and_is_bfloat16_where_quantised(tmp_path, config, tensors, kind, dtype):
    checkpoint = from_gguf(write_gguf(tmp_path / "model.gguf", config, tensors, kind=kind), tmp_path / "colm")
    assert {tensor.dtype for tensor in checkpoint.tensors(tensors).values()} == {dtype}


def test_config_comes_from_the_metadata(tmp_path):
    config = tiny_config(chains=(4,), explicit_head_dim=32, rope_theta=5000.0, norm_eps=2.0**-17)
    source = write_gguf(tmp_path / "model.gguf", config, random_tensors(config))
    assert from_gguf(source, tmp_path / "colm").config == config


def test_embedding_is_the_head_where_the_file_has_none(tmp_path):
    config = tiny_config(chains=(4,), tie_embeddings=True)
    source = write_gguf(tmp_path / "model.gguf", config, random_tensors(config))
    assert from_gguf(source, tmp_path / "colm").config.tie_embeddings


def test_linear_scaling_is_read_in_both_spellings(tmp_path, config, tensors):
    now = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    for index, metadata in enumerate((now, {"llama.rope.scale_linear": 4.0})):
        source = write_gguf(tmp_path / f"{index}.gguf", config, tensors, **metadata)
        scaling = from_gguf(source, tmp_path / f"colm{index}").config.rope_scaling
        assert scaling == RopeScaling(kind="linear", factor=4.0)


YARNS = {
    "bare": ({}, {"original_max_context": 512}),
    "from a context": ({"original_context_length": 64}, {"original_max_context": 64}),
    "betas": (
        {"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0, "yarn_ext_factor": 1.0},
        {"original_max_context": 512, "beta_fast": 16.0, "beta_slow": 2.0},
    ),
    # llama.cpp multiplies by the paper's 1 + ln(4) / 10.
    "attention factor": (
        {"attn_factor": 0.5},
        {"original_max_context": 512, "attention_factor": 0.5 * (1 + math.log(4) / 10)},
    ),
}


@pytest.mark.parametrize(("metadata", "expected"), YARNS.values(), ids=YARNS.keys())
def test_yarn_is_read_as_llama_cpp_does(tmp_path, config, tensors, metadata, expected):
    keys = {"type": "yarn", "factor": 4.0} | metadata
    source = write_gguf(
        tmp_path / "m.gguf", config, tensors, **{f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    )
    scaling = from_gguf(source, tmp_path / "colm").config.rope_scaling
    assert scaling == RopeScaling(kind="yarn", factor=4.0, **expected)


@pytest.mark.parametrize("key", ["yarn_ext_factor", "yarn_attn_factor", "yarn_log_multiplier"])
def test_unusual_yarn_is_refused_by_name(tmp_path, config, tensors, key):
    metadata = {"type": "yarn", "factor": 4.0, key: 0.5}
    source = write_gguf(
        tmp_path / "m.gguf", config, tensors, **{f"llama.rope.scaling.{key}": value for key, value in metadata.items()}
    )
    with pytest.raises(UnsupportedModel, match=rf"rope\.scaling\.{key}=0\.5 is not supported"):
        from_gguf(source, tmp_path / "colm")


def llama3_divisors(config: ChainConfig, factor: float, context: int, low: float, high: float) -> torch.Tensor:
    divisors = []
    for plane in range(config.head_dim // 2):
        wavelength = 2 * math.pi * config.rope_theta ** (2 * plane / config.head_dim)
        smooth = (context / wavelength - low) / (high - low)
        divisors.append(1 / ((1 - smooth) / factor + smooth) if 0 < smooth < 1 else factor if smooth <= 0 else 1.0)
    return torch.from_numpy(np.array(divisors, dtype=np.float32))


@pytest.mark.parametrize(("factor", "context"), [(8.0, 8192), (32.0, 8192), (4.0, 2048)])
def test_llama3_scaling_is_recognised_by_its_factors(tmp_path, factor, context):
    config = tiny_config(chains=(4,), rope_theta=500_000.0, explicit_head_dim=64)
    divisors = llama3_divisors(config, factor, context, 1.0, 4.0)
    source = write_gguf(tmp_path / "model.gguf", config, random_tensors(config), extra={"rope_freqs.weight": divisors})
    found = from_gguf(source, tmp_path / "colm").config
    assert found.rope_scaling == RopeScaling(kind="llama3", factor=factor, original_max_context=context)
    torch.testing.assert_close(inverse_frequencies(found), inverse_frequencies(config) / divisors, rtol=1e-5, atol=0)


def test_factors_that_are_not_llama3_are_refused_by_name(tmp_path):
    config = tiny_config(chains=(4,), rope_theta=500_000.0, explicit_head_dim=64)
    for index, divisors in enumerate(
        (llama3_divisors(config, 8.0, 8192, 1.0, 5.0), torch.linspace(1, 8, 32), torch.ones(7))
    ):
        source = write_gguf(
            tmp_path / f"{index}.gguf", config, random_tensors(config), extra={"rope_freqs.weight": divisors}
        )
        with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight"):
            from_gguf(source, tmp_path / "colm")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.expert_count", 8),
        ("llama.rope.scaling.type", "longrope"),
        ("llama.rope.dimension_count", 8),
        ("llama.attention.value_length", 8),
        ("llama.attention.head_count_kv", [2, 4]),
        ("split.count", 2),
    ],
)
def test_property_without_a_place_is_refused_by_name(tmp_path, config, tensors, key, value):
    source = write_gguf(tmp_path / "model.gguf", config, tensors, **{key: value})
    with pytest.raises(UnsupportedModel, match=key.replace(".", r"\.")):
        from_gguf(source, tmp_path / "colm")


def test_other_architecture_is_refused(tmp_path, config, tensors):
    source = write_gguf(tmp_path / "model.gguf", config, tensors, arch="qwen2")
    with pytest.raises(UnsupportedModel, match="'qwen2'"):
        from_gguf(source, tmp_path / "colm")


def test_other_tensor_type_is_refused_by_tensor_and_type(tmp_path, config, tensors):
    source = write_gguf(tmp_path / "model.gguf", config, tensors, kind=Type.Q5_0)
    with pytest.raises(UnsupportedModel, match=r"'token_embd\.weight' has type Q5_0"):
        from_gguf(source, tmp_path / "colm")


def test_tensor_without_a_place_is_refused(tmp_path, config, tensors):
    source = write_gguf(tmp_path / "m.gguf", config, tensors, extra={"blk.0.attn_q.bias": torch.ones(64)})
    with pytest.raises(UnsupportedModel, match=r"'blk\.0\.attn_q\.bias'"):
        from_gguf(source, tmp_path / "colm")


def test_missing_tensor_is_refused_by_its_gguf_name(tmp_path, config, tensors):
    del tensors["layers.1.ffn.up.chain1"]
    source = write_gguf(tmp_path / "model.gguf", config, tensors)
    with pytest.raises(CheckpointError, match=r"'blk\.1\.ffn_up\.weight' is missing"):
        from_gguf(source, tmp_path / "colm")


def test_misshapen_tensor_is_refused_by_its_gguf_name(tmp_path, config, tensors):
    tensors["final_norm.chain1"] = torch.ones(65)
    source = write_gguf(tmp_path / "model.gguf", config, tensors)
    with pytest.raises(CheckpointError, match=r"'output_norm\.weight' has shape \(65,\)"):
        from_gguf(source, tmp_path / "colm")


@pytest.mark.parametrize("kept", [0, 3, 100, 40_000, -1])
def test_truncated_file_is_refused(tmp_path, config, tensors, kept):
    source = write_gguf(tmp_path / "model.gguf", config, tensors)
    source.write_bytes(source.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"truncated or not a GGUF file"):
        from_any(source, tmp_path / "colm")


def test_missing_file_and_missing_metadata_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.gguf does not exist"):
        from_gguf(tmp_path / "nothing.gguf", tmp_path / "colm")
    writer = gguf.GGUFWriter(tmp_path / "bare.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((320, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"'llama\.attention\.head_count' is missing"):
        from_gguf(tmp_path / "bare.gguf", tmp_path / "colm")


def test_text_conventions_come_from_the_metadata(tmp_path, config, tensors):
    text = from_any(write_gguf(tmp_path / "m.gguf", config, tensors, tokenizer=True), tmp_path / "colm").text
    assert (text.bos_token_id, text.eos_token_ids, text.add_bos) == (1, (2, 0), False)
    assert text.chat_template == CHAT_TEMPLATE


def test_unknown_tokenizer_is_named_in_a_warning_and_ids_are_served(tmp_path, config, tensors):
    for index, (key, value) in enumerate((("tokenizer.ggml.model", "bert"), ("tokenizer.ggml.pre", "exotic"))):
        metadata = {"tokenizer.ggml.model": "gpt2"} | {key: value}
        source = write_gguf(tmp_path / f"{index}.gguf", config, tensors, **metadata)
        with pytest.warns(UserWarning, match=f"{key}='{value}' is unknown"):
            checkpoint = from_gguf(source, tmp_path / f"colm{index}")
        assert checkpoint.tokenizer_path is None
