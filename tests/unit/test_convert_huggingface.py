"""Import of Hugging Face directories: what is carried over, and what is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors

from colm.checkpoint import Checkpoint
from colm.convert import from_any, from_huggingface
from colm.errors import CheckpointError, UnsupportedModel
from colm.model.config import RopeScaling
from tests.tiny import CHAT_TEMPLATE, edit_json, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*serves token ids only")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def convert(source: Path, tmp_path: Path) -> Callable[..., Checkpoint]:
    return lambda **options: from_huggingface(source, tmp_path / "colm", **options)


def put_tokenizer(source: Path, **config: object) -> None:
    (source / "tokenizer.json").write_text(tiny_tokenizer().to_str())
    (source / "tokenizer_config.json").write_text(json.dumps(config))


def edit_weights(source: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")


def test_weights_are_carried_over_bit_identical(source, convert):
    theirs, ours = load_file(source / "model.safetensors"), convert()
    names = {
        "embedding.chain1": "model.embed_tokens.weight",
        "layers.1.attention.wk.chain1": "model.layers.1.self_attn.k_proj.weight",
        "layers.1.ffn_norm.chain1": "model.layers.1.post_attention_layernorm.weight",
        "head.chain1": "lm_head.weight",
    }
    found = ours.tensors(names)
    assert all(torch.equal(found[name], theirs[names[name]]) for name in names)


def test_sharded_weights_equal_a_single_file(source, convert, tmp_path):
    whole = convert()
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    files = {name: f"model-0000{index % 2 + 1}-of-00002.safetensors" for index, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, source / file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    sharded = from_huggingface(source, tmp_path / "sharded")
    assert (whole.path / "model.safetensors").read_bytes() == (sharded.path / "model.safetensors").read_bytes()


def test_missing_shard_is_named(source, convert):
    tensors = load_file(source / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001\.safetensors is missing"):
        convert()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept_unless_one_is_asked_for(tmp_path, stored):
    tiny_llama(tmp_path / "hf", dtype=stored)
    assert from_huggingface(tmp_path / "hf", tmp_path / "kept").dtype() == stored
    assert from_huggingface(tmp_path / "hf", tmp_path / "cast", dtype=torch.bfloat16).dtype() == torch.bfloat16


def test_mixed_dtypes_become_the_widest(source, convert):
    edit_weights(source, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].half()}))
    assert {tensor.dtype for tensor in convert().tensors(["embedding.chain1", "head.chain1"]).values()} == {
        torch.float32
    }


def test_dtype_that_no_checkpoint_has_is_refused(convert):
    with pytest.raises(UnsupportedModel, match="dtype=float64"):
        convert(dtype=torch.float64)


def test_tied_head_is_not_stored_twice(tmp_path):
    tiny_llama(tmp_path / "hf", tie_word_embeddings=True)
    checkpoint = from_huggingface(tmp_path / "hf", tmp_path / "colm")
    assert checkpoint.config.tie_embeddings
    assert "head.chain1" not in load_file(checkpoint.weights_path)


def test_head_dim_that_follows_from_the_widths_is_not_explicit(source, convert):
    edit_json(source / "config.json", head_dim=16)
    assert convert().config.explicit_head_dim is None


def test_llama3_scaling_is_carried_over(source, convert):
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    edit_json(source / "config.json", rope_parameters={"rope_theta": 500000.0, **scaling})
    config = convert().config
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling(kind="llama3", factor=32.0, original_max_context=8192)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ["MistralForCausalLM"]),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("quantization_config", {"quant_method": "gptq"}),
    ],
)
def test_property_without_a_place_is_refused_by_name(source, convert, field, value):
    edit_json(source / "config.json", **{field: value})
    with pytest.raises(UnsupportedModel, match=field):
        convert()


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_unknown_rope_type_is_refused_by_name(source, convert, field):
    edit_json(source / "config.json", rope_parameters=None)
    edit_json(source / "config.json", **{field: {"rope_type": "su", "factor": 2.0}})
    with pytest.raises(UnsupportedModel, match=f"{field}.rope_type='su' is unknown"):
        convert()


def test_dynamic_scaling_is_refused_with_the_reason(source, convert):
    edit_json(source / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(UnsupportedModel, match=r"rope_type='dynamic' cannot be served.*follow the prompt's length"):
        convert()


@pytest.mark.parametrize("value", [None, "far", [4.0]])
def test_rope_value_that_is_no_number_is_refused(source, convert, value):
    edit_json(source / "config.json", rope_parameters={"rope_type": "yarn", "factor": value})
    with pytest.raises(UnsupportedModel, match=r"config\.json: rope_parameters: "):
        convert()


def test_missing_rope_value_is_named(source, convert):
    edit_json(source / "config.json", rope_parameters={"rope_type": "linear"})
    with pytest.raises(CheckpointError, match=r"rope_parameters\.factor is missing"):
        convert()


def test_partial_rotation_is_refused(source, convert):
    edit_json(source / "config.json", partial_rotary_factor=0.5)
    with pytest.raises(UnsupportedModel, match=r"partial_rotary_factor=0\.5"):
        convert()


def test_heads_that_do_not_group_are_refused(source, convert):
    edit_json(source / "config.json", num_key_value_heads=3)
    with pytest.raises(UnsupportedModel, match="num_kv_heads=3"):
        convert()


def test_missing_tensor_is_refused_by_its_hugging_face_name(source, convert):
    edit_weights(source, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing"):
        convert()


def test_misshapen_tensor_is_refused_by_its_hugging_face_name(source, convert):
    edit_weights(source, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has shape \(63,\)"):
        convert()


def test_tensor_without_a_place_is_refused(source, convert):
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_weights(source, lambda tensors: tensors.update({name: torch.ones(64)}))
    with pytest.raises(UnsupportedModel, match=r"q_proj\.bias"):
        convert()


def test_stored_rotary_frequencies_of_old_checkpoints_are_ignored(source, convert):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(source, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert convert().config.num_layers == 2


def test_integer_weights_are_refused_by_tensor_and_type(source, convert):
    edit_weights(source, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(UnsupportedModel, match=r"'model\.norm\.weight' is stored as I8"):
        convert()


def test_truncated_weights_are_refused(source, convert):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        convert()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_missing_file_is_named(source, convert, file):
    (source / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        convert()


def test_failed_import_leaves_nothing_behind(source, convert, tmp_path):
    edit_weights(source, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError):
        convert()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_model_without_tokenizer_warns_and_serves_ids(convert):
    with pytest.warns(UserWarning, match="serves token ids only"):
        checkpoint = convert()
    assert checkpoint.tokenizer_path is None


def test_generation_config_is_the_authority_on_stop_ids(source, convert):
    put_tokenizer(source, eos_token="<|endoftext|>")
    edit_json(source / "config.json", eos_token_id=0)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert convert().text.eos_token_ids == (2, 0)


def test_tokenizer_config_gives_what_the_others_do_not(source, convert):
    put_tokenizer(source, eos_token={"content": "<|im_end|>"}, bos_token="<|im_start|>", chat_template=CHAT_TEMPLATE)
    edit_json(source / "config.json", eos_token_id=None, bos_token_id=None)
    (source / "generation_config.json").unlink()
    text = convert().text
    assert (text.bos_token_id, text.eos_token_ids, text.add_bos) == (1, (2,), False)
    assert text.chat_template == CHAT_TEMPLATE


def test_template_file_goes_before_the_one_in_the_config(source, convert):
    put_tokenizer(source, chat_template=[{"name": "default", "template": "old"}])
    assert convert().text.chat_template == "old"
    (source / "chat_template.jinja").write_text("new")
    assert convert().text.chat_template == "new"


def test_bos_is_added_where_the_post_processor_adds_it(source, convert):
    put_tokenizer(source, bos_token="<|im_start|>")
    tokenizer = tiny_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    (source / "tokenizer.json").write_text(tokenizer.to_str())
    assert convert().text.add_bos
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>", "add_bos_token": False}))
    assert not convert().text.add_bos


def test_broken_tokenizer_is_refused(source, convert):
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        convert()


def test_progress_counts_every_tensor(convert):
    calls: list[tuple[int, int]] = []
    convert(progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 21) for done in range(1, 22)]


def test_from_any_recognises_a_directory_and_refuses_what_is_neither(source, tmp_path):
    assert from_any(source, tmp_path / "colm").config.num_layers == 2
    with pytest.raises(CheckpointError, match="does not exist"):
        from_any(tmp_path / "nothing", tmp_path / "colm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnsupportedModel, match=r"has no config\.json"):
        from_any(tmp_path / "empty", tmp_path / "colm")
