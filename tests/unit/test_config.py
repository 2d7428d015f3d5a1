"""What may be configured: the shape of a model, and the options of a cluster."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.options import ClusterConfig, load_config
from colm.errors import ConfigError
from colm.model import num_parameters, parameter_shapes
from colm.model.config import ChainConfig, RopeScaling
from colm.model.transformer import slice_config
from prefill_node.sparse.policy import AuditPolicy, SparsePolicy
from tests.tiny import tiny_config

BAD_SHAPES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no dim": ({"dim": 0}, ("dim=0", "at least 1")),
    "negative hidden dim": ({"hidden_dim": -8}, ("hidden_dim=-8", "at least 1")),
    "no layers": ({"num_layers": 0}, ("num_layers=0", "at least 1")),
    "no heads": ({"num_heads": 0}, ("num_heads=0", "at least 1")),
    "no kv heads": ({"num_kv_heads": 0}, ("num_kv_heads=0", "at least 1")),
    "no vocabulary": ({"vocab_size": 0}, ("vocab_size=0", "at least 1")),
    "no context": ({"max_context": 0}, ("max_context=0", "at least 1")),
    "no chains": ({"chains": ()}, ("chains=()", "non-empty list of positive")),
    "an empty chain": ({"chains": (8, 0)}, ("chains=(8, 0)", "non-empty list of positive")),
    "chains and heads differ": ({"chains": (4, 2)}, ("chains=(4, 2)", "num_heads=8", "must be equal")),
    "dim does not split": ({"dim": 130}, ("dim=130", "(4, 2, 2)", "multiple of 8, e.g. 128")),
    "hidden dim does not split": ({"hidden_dim": 190}, ("hidden_dim=190", "multiple of 8, e.g. 192")),
    "a chain cuts a kv group": ({"num_kv_heads": 4}, ("chains=(4, 2, 2)", "multiple of num_kv_heads=4", "2 is not")),
    "kv heads do not split": ({"kv_sharing": False}, ("num_kv_heads=2", "must split", "num_kv_heads=4")),
    "head dim is a fraction": (
        {"chains": (4, 4), "dim": 130},
        ("dim=130", "num_heads=8", "give explicit_head_dim"),
    ),
    "head dim is odd": ({"explicit_head_dim": 15}, ("head_dim=15", "must be even")),
}

BAD_SCALINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown kind": ({"kind": "su"}, ("rope_scaling.kind='su'", "'linear', 'llama3', 'yarn'")),
    "dynamic": ({"kind": "dynamic"}, ("rope_scaling.kind='dynamic'", "follow the prompt's length", "use 'yarn'")),
    "longrope": ({"kind": "longrope"}, ("rope_scaling.kind='longrope'", "follow the prompt's length")),
    "shrinking": ({"factor": 0.5}, ("rope_scaling.factor=0.5", "at least 1.0")),
    "not a number": ({"factor": float("nan")}, ("rope_scaling.factor=nan", "at least 1.0")),
    "without end": ({"factor": float("inf")}, ("rope_scaling.factor=inf", "finite")),
    "no original context": ({"original_max_context": 0}, ("rope_scaling.original_max_context=0", "at least 1")),
    "betas crossed": (
        {"kind": "yarn", "beta_fast": 1.0, "beta_slow": 32.0},
        ("rope_scaling.beta_slow=32.0", "below beta_fast=1.0"),
    ),
    "no attention": (
        {"kind": "yarn", "attention_factor": 0.0},
        ("rope_scaling.attention_factor=0.0", "above 0"),
    ),
    "bounds crossed": (
        {"low_freq_factor": 4.0, "high_freq_factor": 1.0},
        ("rope_scaling.low_freq_factor=4.0", "below high_freq_factor=1.0"),
    ),
}

SHAPES = {
    "chains": tiny_config(),
    "plain llama": tiny_config(chains=(4,)),
    "tied": tiny_config(tie_embeddings=True),
    "own head dim": tiny_config(explicit_head_dim=32),
    "stretched rope": tiny_config(rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_context=64)),
    "yarn": tiny_config(rope_scaling=RopeScaling(kind="yarn", factor=4.0, beta_fast=16.0, attention_factor=1.5)),
}


@pytest.mark.parametrize(("change", "fragments"), BAD_SHAPES.values(), ids=BAD_SHAPES.keys())
def test_an_impossible_shape_is_refused_with_field_value_and_way_out(
    change: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the message is what is tested
        replace(tiny_config(), **change)
    for fragment in fragments:
        assert fragment in str(refusal.value)


@pytest.mark.parametrize(("change", "fragments"), BAD_SCALINGS.values(), ids=BAD_SCALINGS.keys())
def test_an_impossible_rope_scaling_is_refused_with_field_and_value(
    change: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the message is what is tested
        RopeScaling(**{"kind": "llama3", "factor": 8.0, **change})
    for fragment in fragments:
        assert fragment in str(refusal.value)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_a_shape_survives_json(config: ChainConfig) -> None:
    assert ChainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_model_field_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown model fields \['num_experts'\]"):
        ChainConfig.from_dict(tiny_config().to_dict() | {"num_experts": 8})


def test_a_missing_model_field_is_named() -> None:
    data = tiny_config().to_dict()
    del data["vocab_size"]
    with pytest.raises(ValueError, match="vocab_size"):
        ChainConfig.from_dict(data)


def test_an_unknown_rope_field_is_named() -> None:
    """Bug: it came out as a TypeError, which from_dict does not promise."""
    scaling = {"kind": "linear", "factor": 2.0, "alpha": 32}
    with pytest.raises(ValueError, match="alpha"):
        ChainConfig.from_dict(tiny_config().to_dict() | {"rope_scaling": scaling})


@pytest.mark.parametrize("num_chains", [-1, 0, 4])
def test_a_scale_outside_the_model_is_refused(num_chains: int) -> None:
    with pytest.raises(ValueError, match=f"num_chains={num_chains} must be between 1 and 3"):
        tiny_config().resolve_num_chains(num_chains)


def test_no_scale_means_all_chains() -> None:
    assert tiny_config().resolve_num_chains(None) == 3


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_chains", [1, 2, 3])
def test_parameters_by_scale_are_those_of_the_staircase(num_chains: int, tied: bool) -> None:
    config = tiny_config(tie_embeddings=tied, explicit_head_dim=32)
    expected = 2 * config.num_layers * config.chain_dims[0] * config.kv_dim
    dims = hidden_dims = query_dims = 0
    for dim, hidden_dim, query_dim in list(
        zip(config.chain_dims, config.chain_hidden_dims, config.chain_query_dims, strict=True)
    )[:num_chains]:
        dims, hidden_dims, query_dims = dims + dim, hidden_dims + hidden_dim, query_dims + query_dim
        attention = query_dim * dims + dim * query_dims
        ffn = 2 * hidden_dim * dims + dim * hidden_dims
        expected += config.num_layers * (attention + ffn + 2 * dim)
        expected += dim + config.vocab_size * dim * (1 if tied else 2)
    assert num_parameters(config, num_chains) == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"dim": 4096, "hidden_dim": 11008, "num_layers": 32, "num_kv_heads": 32}, 6_738_415_616),
        ({"dim": 2048, "hidden_dim": 5632, "num_layers": 22, "num_kv_heads": 4}, 1_100_048_384),
    ],
    ids=["LLaMA-7B", "TinyLlama-1.1B"],
)
def test_parameters_of_published_models(shape: dict[str, int], expected: int) -> None:
    config = ChainConfig(**shape, num_heads=32, chains=(32,), vocab_size=32000)
    assert num_parameters(config) == expected


@pytest.mark.parametrize("num_chains", [1, 2, 3])
def test_a_slice_has_exactly_the_tensors_of_its_scale(num_chains: int) -> None:
    config = tiny_config(explicit_head_dim=32)
    assert parameter_shapes(slice_config(config, num_chains)) == parameter_shapes(config, num_chains)


def test_a_slice_keeps_what_chains_share() -> None:
    config = tiny_config(rope_theta=5000.0)
    sliced = slice_config(config, 2)
    assert (sliced.dim, sliced.hidden_dim, sliced.num_heads, sliced.chains) == (96, 144, 6, (4, 2))
    for name in ("head_dim", "num_kv_heads", "num_layers", "vocab_size", "rope_theta", "max_context", "norm_eps"):
        assert getattr(sliced, name) == getattr(config, name)


def test_the_slice_of_all_chains_is_the_model_itself() -> None:
    config = tiny_config()
    assert slice_config(config, 3) == config


def written(directory: Path, text: str) -> Path:
    path = directory / "cluster.toml"
    path.write_text(text)
    return path


BAD_FILES = {
    "unknown option": ("[model]\ndtpye = 'float32'", "model.dtpye is not an option"),
    "unknown section": ("[decoder]\nreplicas = 1", "decoder is not an option"),
    "wrong type": ("[prefill]\nreplicas = 'two'", "prefill.replicas='two'"),
    "below the range": ("[prefill]\nreplicas = 0", "prefill.replicas=0"),
    "above the range": ("[gateway]\nport = 65536", "gateway.port=65536"),
    "not one of the words": ("[model]\ndtype = 'int4'", "model.dtype='int4'"),
    "not a size": ("[decode]\nkv_cache_bytes = 'lots'", "decode.kv_cache_bytes='lots'"),
    "a negative size": ("[gateway]\nmax_document_bytes = -1", "gateway.max_document_bytes=-1"),
    "no time": ("[gateway]\ndefault_timeout_s = 0", "gateway.default_timeout_s=0"),
    "a value for a section": ("model = 'here'", "model='here'"),
    "a default deadline that no client may ask for": (
        "[gateway]\nmax_timeout_s = 60",
        "gateway.default_timeout_s=3600.0 is above gateway.max_timeout_s=60.0; lower the one or raise the other",
    ),
    "a document that all uploads together may not reach": (
        "[gateway]\nmax_document_bytes = '2GiB'",
        "gateway.max_document_bytes=2147483648 is above gateway.max_upload_bytes=1073741824; lower the one",
    ),
    "a default length that no client may ask for": (
        "[gateway]\ndefault_max_new_tokens = 300\nmax_new_tokens = 299",
        "gateway.default_max_new_tokens=300 is above gateway.max_new_tokens=299; lower the one or raise the other",
    ),
}


@pytest.mark.parametrize(("text", "fragment"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_option_is_named_with_its_value(tmp_path: Path, text: str, fragment: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(written(tmp_path, text), {})
    assert fragment in str(refusal.value)


def test_every_bad_option_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(written(tmp_path, "[model]\ncolour = 1\n[decode]\nmax_batch_size = -3"), {})
    assert "model.colour" in str(refusal.value)
    assert "decode.max_batch_size=-3" in str(refusal.value)


def test_a_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "[model\n")
    with pytest.raises(ConfigError, match="is not valid TOML") as refusal:
        load_config(path, {})
    assert str(path) in str(refusal.value)


BAD_SPARSE = {
    "sparse_mass = 0.0": "prefill.sparse_mass=0.0 must be above 0",
    "sparse_mass = 1.5": "prefill.sparse_mass=1.5 must be above 0, where nothing is covered, and at most 1",
    "sparse_keys_per_row = 320": "prefill.sparse_keys_per_row=320 covers nothing beside the 320 keys",
    "sparse_mass = 0.9\nsparse_keys_per_row = 4096": "prefill.sparse_mass=0.9 and sparse_keys_per_row=4096",
    "sparse_dense_below_tokens = -1": "prefill.sparse_dense_below_tokens=-1",
    "audit_floor = 1.0": "prefill.audit_floor=1.0 must be at least 0 and below 1",
    "audit_confidence = 1.0": "prefill.audit_confidence=1.0 must be above 0 and below 1",
    "audit_max_rows = 1": "prefill.audit_max_rows=1 must be at least 2",
    "audit_max_cost = 0.05": "prefill.audit_max_cost=0.05 must be above 0 and below 0.05",
}


@pytest.mark.parametrize(("text", "fragment"), BAD_SPARSE.items(), ids=BAD_SPARSE)
def test_a_sparse_option_out_of_range_is_refused_by_name(tmp_path: Path, text: str, fragment: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(written(tmp_path, f"[prefill]\n{text}"), {})
    assert fragment in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("", SparsePolicy()),
        ("sparse_mass = 0.9", SparsePolicy(mass=0.9)),
        ("sparse_keys_per_row = 4096", SparsePolicy(mass=None, keys_per_row=4096)),
        ("sparse_dense_below_tokens = 0", SparsePolicy(dense_below_tokens=0)),
    ],
)
def test_sparse_options_are_a_policy(tmp_path: Path, text: str, policy: SparsePolicy) -> None:
    assert load_config(written(tmp_path, f"[prefill]\n{text}"), {}).prefill.sparse_policy == policy


def test_audit_options_are_a_policy(tmp_path: Path) -> None:
    text = "audit_floor = 0.5\naudit_confidence = 0.9\naudit_max_rows = 9\naudit_max_cost = 0.01"
    assert load_config(written(tmp_path, f"[prefill]\n{text}"), {}).prefill.audit_policy == AuditPolicy(
        floor=0.5, confidence=0.9, max_rows=9, max_cost=0.01
    )
    assert load_config(written(tmp_path, ""), {}).prefill.audit_policy == AuditPolicy()


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid TOML") as refusal:
        load_config(path, {})
    assert str(path) in str(refusal.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.toml: No such file"):
        load_config(tmp_path / "absent.toml", {})


def test_without_a_file_the_defaults_serve() -> None:
    assert load_config(None, {}) == ClusterConfig()


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "[prefill]\nreplicas = 2\nnum_threads = 3\n[gateway]\nport = 6000")
    config = load_config(path, {"prefill.replicas": 4, "gateway.port": None, "decode.replicas": 5})
    assert (config.prefill.replicas, config.prefill.num_threads) == (4, 3)
    assert (config.gateway.port, config.decode.replicas) == (6000, 5)


def test_standby_replicas_come_on_top_of_the_others(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "[decode]\nreplicas = 2\nstandby = 1"), {})
    assert (config.decode.num_replicas, config.prefill.num_replicas) == (3, 1)


def test_an_override_into_something_that_is_no_section_is_refused(tmp_path: Path) -> None:
    """Bug: `model = "DIR"` in the file and `--model DIR` on the command line ended in a TypeError."""
    with pytest.raises(ConfigError, match="model"):
        load_config(written(tmp_path, "model = 'here'"), {"model.path": Path("there")})


@pytest.mark.parametrize(
    ("written_size", "num_bytes"),
    [("'4GiB'", 4 << 30), ("'64MiB'", 64 << 20), ("'1.5 KiB'", 1536), ("'2GB'", 2_000_000_000), ("4096", 4096)],
)
def test_sizes_are_read_with_their_unit(tmp_path: Path, written_size: str, num_bytes: int) -> None:
    config = load_config(written(tmp_path, f"[decode]\nkv_cache_bytes = {written_size}"), {})
    assert config.decode.kv_cache_bytes == num_bytes


def test_a_default_at_its_limit_is_accepted(tmp_path: Path) -> None:
    options = "default_timeout_s = 60\nmax_timeout_s = 60\ndefault_max_new_tokens = 7\nmax_new_tokens = 7"
    assert load_config(written(tmp_path, f"[gateway]\n{options}"), {}).gateway.max_new_tokens == 7


def test_tiles_and_pages_know_nothing_of_each_other(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "[prefill]\ntile_tokens = 100\n[decode]\npage_tokens = 64"), {})
    assert (config.prefill.tile_tokens, config.decode.page_tokens) == (100, 64)
