"""colm import, expand, slice, export, inspect, search-patterns: making checkpoints and looking at them.

PyTorch is imported only when one of them runs: the other commands should not wait for it.
"""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.output import JsonFlag, human_bytes, note, print_json, progress_bar
from colm.errors import ConfigError

if TYPE_CHECKING:
    from colm.convert import Stretch

Source = Annotated[Path, typer.Argument(help="A GGUF file or a Hugging Face LLaMA directory.")]
CheckpointSource = Annotated[Path, typer.Argument(help="Checkpoint directory.")]
Destination = Annotated[Path, typer.Argument(help="Checkpoint directory to write.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("import")(import_model)
    app.command("expand")(expand_model)
    app.command("slice")(slice_model)
    app.command("export")(export_model)
    app.command("inspect")(inspect_model)
    app.command("search-patterns")(search_patterns)


def import_model(
    src: Source,
    dest: Destination,
    dtype: Annotated[str, typer.Option(help="auto keeps the source's; quantised sources become bfloat16.")] = "auto",
    rope_scaling: Annotated[
        str | None, typer.Option(help="yarn or linear: run the model beyond the context it was trained for.")
    ] = None,
    rope_factor: Annotated[
        float | None, typer.Option(help="How many times the trained context; with --rope-scaling.")
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(help="Longest sequence in tokens, with --rope-scaling; default: as long as the factor allows."),
    ] = None,
) -> None:
    """Turn a GGUF file or a Hugging Face LLaMA directory into a checkpoint."""
    from colm.convert import from_any
    from colm.dtypes import dtype_name, parse_dtype
    from colm.model import num_parameters

    wanted = None
    if dtype != "auto":
        try:
            wanted = parse_dtype(dtype)
        except ValueError as err:
            raise ConfigError(f"--{err}") from err
    stretch = _stretch(rope_scaling, rope_factor, max_context)
    with progress_bar("importing") as report:
        checkpoint = from_any(src, dest, dtype=wanted, stretch=stretch, progress=report)
    note(f"wrote {dest}: {num_parameters(checkpoint.config):,} parameters, {dtype_name(checkpoint.dtype())}")


def _stretch(kind: str | None, factor: float | None, max_context: int | None) -> "Stretch | None":
    from colm.convert import Stretch
    from colm.model.config import parse_rope_kind

    if kind is None:
        for name, value in (("rope-factor", factor), ("max-context", max_context)):
            if value is not None:
                raise ConfigError(f"--{name}={value} needs --rope-scaling, e.g. --rope-scaling=yarn")
        return None
    if factor is None:
        raise ConfigError(f"--rope-scaling={kind} needs --rope-factor, e.g. --rope-factor=4")
    try:
        known = parse_rope_kind(kind)
    except ValueError as err:
        raise ConfigError(f"--rope-scaling={err}") from err
    try:
        return Stretch(kind=known, factor=factor, max_context=max_context)
    except ValueError as err:
        raise ConfigError(f"--rope-scaling={kind} --rope-factor={factor:g}: {err}") from err


def expand_model(
    src: CheckpointSource,
    dest: Destination,
    chains: Annotated[str, typer.Option(help="Query heads of each chain, e.g. 9,3; must begin with the source's.")],
    kv_sharing: Annotated[
        bool | None,
        typer.Option(help="New chains read chain 1's keys and values, or have their own; default: as the source's do."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Fixes how the new chains start.")] = 0,
) -> None:
    """Add chains to a model; it answers exactly as before until they are trained."""
    from colm.convert import expand
    from colm.model import num_parameters

    try:
        counts = [int(part) for part in chains.split(",")]
    except ValueError as err:
        raise ConfigError(f"--chains={chains!r} must be numbers separated by commas, e.g. 9,3") from err
    with progress_bar("expanding") as report:
        checkpoint = expand(src, dest, counts, kv_sharing=kv_sharing, seed=seed, progress=report)
    note(f"wrote {dest}: chains {list(checkpoint.config.chains)}, {num_parameters(checkpoint.config):,} parameters")


def slice_model(
    src: CheckpointSource,
    dest: Destination,
    chains: Annotated[int, typer.Option(help="How many of the first chains to keep.")],
) -> None:
    """Write one scale of a model as a model of its own."""
    from colm.convert import slice_scale
    from colm.model import num_parameters

    try:
        with progress_bar("slicing") as report:
            checkpoint = slice_scale(src, dest, chains, progress=report)
    except ValueError as err:
        raise ConfigError(f"--chains={chains}: {err}") from err
    note(f"wrote {dest}: chains {list(checkpoint.config.chains)}, {num_parameters(checkpoint.config):,} parameters")


def export_model(
    src: CheckpointSource, dest: Annotated[Path, typer.Argument(help="Hugging Face directory to write.")]
) -> None:
    """Write chain 1 as a Hugging Face LLaMA directory."""
    from colm.convert import to_huggingface

    with progress_bar("exporting") as report:
        to_huggingface(src, dest, progress=report)
    note(f"wrote {dest}")


def inspect_model(
    path: CheckpointSource,
    verify: Annotated[bool, typer.Option("--verify", help="Read chain 1's weights and check their digest.")] = False,
    json: JsonFlag = False,
) -> None:
    """Show a checkpoint's config, its parameters by scale and its KV bytes per token."""
    from colm.checkpoint import Checkpoint, verify_backbone
    from colm.dtypes import dtype_name
    from colm.kv import KvFormat
    from colm.model import num_parameters

    checkpoint = Checkpoint.open(path)
    if verify:
        verify_backbone(checkpoint)
    config, dtype = checkpoint.config, checkpoint.dtype()
    token_bytes = KvFormat.of(config, dtype).token_bytes
    scales = {str(scale): num_parameters(config, scale) for scale in range(1, config.num_chains + 1)}
    if json:
        print_json(
            {
                "path": str(path),
                "config": config.to_dict(),
                "dtype": dtype_name(dtype),
                "parameters_by_scale": scales,
                "kv_bytes_per_token": token_bytes,
                "reads_text": checkpoint.tokenizer_path is not None,
                "has_chat_template": checkpoint.text.chat_template is not None,
            }
        )
        return
    kind = "LLaMA" if config.num_chains == 1 else "CoLM-Air" if config.kv_sharing else "CoLM"
    chat = "with chat template" if checkpoint.text.chat_template else "raw completion"
    kv_scope = "the same at every scale" if config.num_chains == 1 or config.kv_sharing else "at the largest scale"
    rows = [
        ("path", str(path)),
        ("kind", f"{kind}, chains {{{','.join(map(str, config.chains))}}}"),
        ("layers", str(config.num_layers)),
        ("dim / ffn", f"{config.dim} / {config.hidden_dim}"),
        ("feed-forward", f"{config.activation}, {'with' if config.bias else 'without'} biases"),
        ("heads", f"{config.num_heads} query, {config.num_kv_heads} kv, head dim {config.head_dim}"),
        ("vocabulary", f"{config.vocab_size}, head {'tied' if config.tie_embeddings else 'of its own'}"),
        ("context", f"{config.max_context} tokens, rope theta {config.rope_theta:g}"),
        ("rope scaling", "none" if config.rope_scaling is None else str(config.rope_scaling)),
        ("dtype", dtype_name(dtype)),
        ("text", chat if checkpoint.tokenizer_path else "token ids only, no tokenizer"),
        ("KV cache", f"{human_bytes(token_bytes)} per token, {kv_scope}"),
    ]
    if verify:
        rows.append(("digest", "chain 1's weights match it"))
    rows += [(f"scale {scale}", f"{count:,} parameters") for scale, count in scales.items()]
    for name, value in rows:
        typer.echo(f"{name:<13} {value}")


def search_patterns(
    model: CheckpointSource,
    text: Annotated[Path, typer.Argument(help="A text like those to be served, UTF-8; the longer, the better.")],
    output: Annotated[Path, typer.Option(help="Pattern file to write, in the format of MInference's configs.")],
    objective: Annotated[str, typer.Option(help="mass: recall the most attention; output: err the least.")] = "mass",
    budget: Annotated[float, typer.Option(help="Products of sparse attention as a share of the dense one's.")] = 0.25,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text that are looked at.")] = 8192,
    json: JsonFlag = False,
) -> None:
    """Find the sparse attention pattern that serves each head of chain 1 best."""
    from colm.checkpoint import Checkpoint
    from colm.text.tokenizer import Tokenizer
    from prefill_node.sparse.search import SearchOptions
    from prefill_node.sparse.search import search_patterns as search

    checkpoint = Checkpoint.open(model)
    tokenizer = Tokenizer.load(checkpoint)
    if tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer, so it cannot read {text}")
    if not output.parent.is_dir():
        raise ConfigError(f"--output={output}: {output.parent} is not a directory")
    try:
        content = text.read_text(encoding="utf-8")
    except OSError as err:
        raise ConfigError(f"{text} cannot be read: {err.strerror}") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"{text} is not UTF-8: {err}") from err
    token_ids = tokenizer.encode(content)
    limit = min(max_tokens, checkpoint.config.max_context)
    if len(token_ids) > limit:
        note(f"using the first {limit} of {len(token_ids)} tokens")
        token_ids = token_ids[:limit]
    if not len(token_ids):
        raise ConfigError(f"{text} is empty")
    try:
        options = SearchOptions(objective=objective, budget=budget)  # type: ignore[arg-type]  # checked there
    except ValueError as err:
        raise ConfigError(f"--{err}") from err
    with progress_bar("searching") as report:
        patterns = search(checkpoint.load(1), token_ids, options, progress=report)
    patterns.write(output)
    found = [pattern for layer in patterns.layers for pattern in layer]
    counts = dict(Counter(pattern.kind for pattern in found).most_common())
    recall = sum(pattern.score for pattern in found) / len(found)
    if json:
        print_json(
            {
                "path": str(model),
                "output": str(output),
                "num_tokens": len(token_ids),
                "objective": objective,
                "budget": budget,
                "heads_by_pattern": counts,
                "mean_recall": round(recall, 4),
            }
        )
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    note(f"wrote {output}: {kinds}; {recall:.1%} of the attention recalled, over {len(token_ids)} tokens")
