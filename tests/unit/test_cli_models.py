"""The commands that make models: what they write, and how they refuse."""

import json
from pathlib import Path

import pytest
import torch
from colm_kernels import tolerance
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cluster.cli import app
from colm.checkpoint import Checkpoint
from colm.errors import CheckpointError, ConfigError, UnsupportedModel
from colm.model.config import RopeScaling
from prefill_node.sparse.patterns import PatternFile
from tests.tiny import edit_json, flip_last_byte, tiny_checkpoint, tiny_config, tiny_llama, without_digest

runner = CliRunner()


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(tiny_checkpoint(tmp_path / "model", tiny_config(chains=(4, 2)), tokenizer=True).path)


def run(*arguments: str) -> str:
    result = runner.invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_slice_writes_a_scale(source, tmp_path):
    run("slice", source, str(tmp_path / "slice"), "--chains", "1")
    assert Checkpoint.open(tmp_path / "slice").config.chains == (4,)


def test_slice_refuses_a_scale_outside_the_model(source, tmp_path):
    with pytest.raises(ConfigError, match="--chains=3: num_chains=3 must be between 1 and 2"):
        run("slice", source, str(tmp_path / "slice"), "--chains", "3")


def test_export_writes_a_directory_that_import_reads(source, tmp_path):
    run("export", source, str(tmp_path / "hf"))
    run("import", str(tmp_path / "hf"), str(tmp_path / "again"))
    assert Checkpoint.open(tmp_path / "again").config.chains == (4,)
    assert Checkpoint.open(tmp_path / "again").text == Checkpoint.open(source).text


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """A Hugging Face directory of a model trained for 512 tokens."""
    tiny_llama(tmp_path / "hf")
    return str(tmp_path / "hf")


def test_import_refuses_weights_that_are_not_finite(llama, tmp_path):
    """Bug: NaN weights were imported and served."""
    weights = Path(llama) / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, weights)
    with pytest.raises(
        CheckpointError, match=r"hf/model\.safetensors: tensor 'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN"
    ):
        run("import", llama, str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("command", [("expand", "--chains", "4,2,2"), ("slice", "--chains", "1")])
def test_weights_that_are_not_finite_are_not_carried_into_another_model(source, tmp_path, command):
    weights = Path(source) / "model.safetensors"
    tensors = load_file(weights)
    tensors["layers.0.ffn.up.chain1"][3, 4] = torch.inf
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"tensor 'layers\.0\.ffn\.up\.chain1' holds NaN or infinities"):
        run(command[0], source, str(tmp_path / "other"), *command[1:])
    assert not (tmp_path / "other").exists()


@pytest.mark.filterwarnings("ignore:.*serves token ids only")
@pytest.mark.parametrize(
    ("kind", "options", "max_context", "shown"),
    [
        ("yarn", [], 2048, "yarn, factor 4 from 512 tokens, betas 32 and 1, attention factor 1.1386"),
        ("yarn", ["--max-context", "1000"], 1000, "yarn, factor 4 from 512 tokens"),
        ("linear", [], 2048, "linear, factor 4"),
    ],
)
def test_import_stretches_a_model_and_inspect_shows_it(llama, tmp_path, kind, options, max_context, shown):
    dest = str(tmp_path / "colm")
    run("import", llama, dest, "--rope-scaling", kind, "--rope-factor", "4", *options)
    config = Checkpoint.open(dest).config
    assert config.max_context == max_context
    trained = {"original_max_context": 512} if kind == "yarn" else {}
    assert config.rope_scaling == RopeScaling(kind=kind, factor=4.0, **trained)
    assert f"rope scaling  {shown}" in run("inspect", dest)
    assert f"context       {max_context} tokens" in run("inspect", dest)


@pytest.mark.filterwarnings("ignore:.*serves token ids only")
@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_a_stretched_model_computes_what_transformers_does_with_that_scaling(llama, tmp_path, kind):
    run("import", llama, str(tmp_path / "colm"), "--rope-scaling", kind, "--rope-factor", "4")
    theirs = {"rope_theta": 10_000.0, "rope_type": kind, "factor": 4.0}
    if kind == "yarn":
        theirs["original_max_position_embeddings"] = 512
    model = tiny_llama(tmp_path / "stretched", rope_parameters=theirs, max_position_embeddings=2048).double()
    tokens_BT = torch.randint(320, (1, 700), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        exact, ours = model(tokens_BT).logits, Checkpoint.open(tmp_path / "colm").load()(tokens_BT)
    tolerance.layers(exact, torch.float32, num_layers=2, width=64).check(ours)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--rope-scaling", "dynamic", "--rope-factor", "4"],
            "--rope-scaling='dynamic' cannot be served.*prompt's length",
        ),
        (["--rope-scaling", "su", "--rope-factor", "4"], "--rope-scaling='su' is unknown"),
        (["--rope-scaling", "llama3", "--rope-factor", "4"], "'llama3' is for models trained with it"),
        (["--rope-scaling", "yarn", "--rope-factor", "0.5"], "--rope-factor=0.5: .*at least 1.0"),
        (["--rope-scaling", "yarn"], "--rope-scaling=yarn needs --rope-factor"),
        (["--rope-factor", "4"], "--rope-factor=4.0 needs --rope-scaling"),
        (["--max-context", "1024"], "--max-context=1024 needs --rope-scaling"),
    ],
)
def test_import_refuses_what_is_no_stretch(llama, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run("import", llama, str(tmp_path / "colm"), *options)
    assert not (tmp_path / "colm").exists()


@pytest.mark.parametrize("max_context", [0, 2049])
def test_import_refuses_a_context_that_the_factor_does_not_allow(llama, tmp_path, max_context):
    stretch = ("--rope-scaling", "yarn", "--rope-factor", "4")
    with pytest.raises(
        UnsupportedModel, match=f"max_context={max_context} must be between 1 and 2048, which is factor=4"
    ):
        run("import", llama, str(tmp_path / "colm"), *stretch, "--max-context", str(max_context))


def test_import_does_not_replace_a_rope_scaling_that_the_model_has(llama, tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    edit_json(tmp_path / "hf/config.json", rope_parameters=rope)
    with pytest.raises(UnsupportedModel, match=r"has a rope scaling of its own \(linear, factor 2\)"):
        run("import", llama, str(tmp_path / "colm"), "--rope-scaling", "yarn", "--rope-factor", "4")


@pytest.mark.parametrize(("option", "shares"), [([], True), (["--kv-sharing"], True), (["--no-kv-sharing"], False)])
def test_expand_gives_new_chains_their_own_keys_and_values_where_asked(tmp_path, option, shares):
    llama = tiny_checkpoint(tmp_path / "llama", tiny_config(chains=(4,)))
    run("expand", str(llama.path), str(tmp_path / "larger"), "--chains", "4,2", *option)
    assert Checkpoint.open(tmp_path / "larger").config.kv_sharing is shares


@pytest.mark.parametrize(
    ("shape", "kind"),
    [({"chains": (4,)}, "LLaMA"), ({}, "CoLM-Air"), ({"kv_sharing": False, "num_kv_heads": 4, "bias": True}, "CoLM")],
)
def test_inspect_describes_every_kind(tmp_path, shape, kind):
    path = str(tiny_checkpoint(tmp_path / "model", tiny_config(**shape)).path)
    assert f"{kind}, chains" in run("inspect", path)
    record = json.loads(run("inspect", path, "--json").splitlines()[-1])
    assert record["config"] == Checkpoint.open(path).config.to_dict()


def test_inspect_verifies_the_weights_that_keys_and_values_depend_on(source):
    assert "digest        chain 1's weights match it" in run("inspect", source, "--verify")
    flip_last_byte(Checkpoint.open(source), "layers.0.attention.wk.chain1")
    assert "digest" not in run("inspect", source)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: chain 1's weights do not match the digest"):
        run("inspect", source, "--verify")


def test_weights_of_an_older_build_have_nothing_to_verify_until_they_are_written_again(source, tmp_path):
    without_digest(Checkpoint.open(source))
    with pytest.raises(CheckpointError, match=rf"no digest to verify.*`colm slice {source} DEST --chains 2`"):
        run("inspect", source, "--verify")
    run("slice", source, str(tmp_path / "again"), "--chains", "2")
    run("inspect", str(tmp_path / "again"), "--verify")


@pytest.fixture
def long_model(tmp_path: Path) -> str:
    config = tiny_config(chains=(4, 2), max_context=1024)
    return str(tiny_checkpoint(tmp_path / "long", config, tokenizer=True).path)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {line} of the text, and {line * line} of it.\n" for line in range(60)))
    return path


def test_search_patterns_writes_a_file_for_the_model(long_model, text, tmp_path):
    output = tmp_path / "patterns.json"
    said = run(
        "search-patterns", long_model, str(text), "--output", str(output), "--budget", "0.8", "--max-tokens", "900"
    )
    assert "using the first 900 of" in said
    assert "recalled, over 900 tokens" in said
    patterns = PatternFile.read(output, Checkpoint.open(long_model).config)
    arguments = ("--budget", "0.8", "--objective", "output", "--json")
    record = json.loads(
        run("search-patterns", long_model, str(text), "--output", str(output), *arguments).splitlines()[-1]
    )
    assert record["num_tokens"] == 1024  # as many as the model reads
    assert sum(record["heads_by_pattern"].values()) == sum(map(len, patterns.layers)) == 8
    assert 0 < record["mean_recall"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "1.5"], "--budget=1.5 must be above 0 and below 1"),
        (["--objective", "speed"], "--objective='speed' is unknown; use mass or output"),
        (["--budget", "0.01"], "budget=0.01 has no room for any pattern"),
        (["--output", "nowhere/patterns.json"], "--output=nowhere/patterns.json: nowhere is not a directory"),
    ],
)
def test_search_patterns_refuses_options_by_name(long_model, text, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run("search-patterns", long_model, str(text), "--output", str(tmp_path / "patterns.json"), *options)
    assert not (tmp_path / "patterns.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read: No such file"), (b"", "is empty"), (b"\xff\xfe", "is not UTF-8")],
)
def test_search_patterns_refuses_a_text_that_it_cannot_read(long_model, text, tmp_path, content, message):
    text.unlink()
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"text\.txt {message}"):
        run("search-patterns", long_model, str(text), "--output", str(tmp_path / "patterns.json"))


def test_search_patterns_needs_a_tokenizer(text, tmp_path):
    path = str(tiny_checkpoint(tmp_path / "mute").path)
    with pytest.raises(ConfigError, match=r"mute has no tokenizer, so it cannot read .*text\.txt"):
        run("search-patterns", path, str(text), "--output", str(tmp_path / "patterns.json"))
