"""colm import, expand, inspect: making checkpoints and looking at them.

PyTorch is imported only when one of them runs: the other commands should not wait for it.
"""

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.output import JsonFlag, human_bytes, note, print_json, progress_bar
from colm.errors import ConfigError

Source = Annotated[Path, typer.Argument(help="A GGUF file or a Hugging Face LLaMA directory.")]
Destination = Annotated[Path, typer.Argument(help="Checkpoint directory to write.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("import")(import_model)
    app.command("expand")(expand_model)
    app.command("inspect")(inspect_model)


def import_model(
    src: Source,
    dest: Destination,
    dtype: Annotated[str, typer.Option(help="auto keeps the source's; quantised sources become bfloat16.")] = "auto",
) -> None:
    """Turn a GGUF file or a Hugging Face LLaMA directory into a checkpoint."""
    from colm.convert import from_any
    from colm.dtypes import dtype_name, parse_dtype

    wanted = None
    if dtype != "auto":
        try:
            wanted = parse_dtype(dtype)
        except ValueError as err:
            raise ConfigError(f"--{err}") from err
    with progress_bar("importing") as report:
        checkpoint = from_any(src, dest, dtype=wanted, progress=report)
    note(f"wrote {dest}: {checkpoint.config.num_parameters():,} parameters, {dtype_name(checkpoint.dtype())}")


def expand_model(
    src: Annotated[Path, typer.Argument(help="Checkpoint directory.")],
    dest: Destination,
    chains: Annotated[str, typer.Option(help="Query heads of each chain, e.g. 9,3; must begin with the source's.")],
    seed: Annotated[int, typer.Option(help="Fixes how the new chains start.")] = 0,
) -> None:
    """Add chains to a model; it answers exactly as before until they are trained."""
    from colm.convert import expand

    try:
        counts = [int(part) for part in chains.split(",")]
    except ValueError as err:
        raise ConfigError(f"--chains={chains!r} must be numbers separated by commas, e.g. 9,3") from err
    with progress_bar("expanding") as report:
        checkpoint = expand(src, dest, counts, seed=seed, progress=report)
    note(f"wrote {dest}: chains {list(checkpoint.config.chains)}, {checkpoint.config.num_parameters():,} parameters")


def inspect_model(path: Annotated[Path, typer.Argument(help="Checkpoint directory.")], json: JsonFlag = False) -> None:
    """Show a checkpoint's config, its parameters by scale and its KV bytes per token."""
    from colm.checkpoint import Checkpoint
    from colm.dtypes import dtype_name
    from colm.kv import KvLayout

    checkpoint = Checkpoint.open(path)
    config, dtype = checkpoint.config, checkpoint.dtype()
    layout = KvLayout.of(config, dtype=dtype, page_tokens=1)
    scales = {str(scale): config.num_parameters(scale) for scale in range(1, config.num_chains + 1)}
    if json:
        print_json(
            {
                "path": str(path),
                "config": config.to_dict(),
                "dtype": dtype_name(dtype),
                "parameters_by_scale": scales,
                "kv_bytes_per_token": layout.token_bytes,
                "reads_text": checkpoint.tokenizer_path is not None,
                "has_chat_template": checkpoint.text.chat_template is not None,
            }
        )
        return
    kind = "LLaMA" if config.num_chains == 1 else "CoLM-Air" if config.kv_sharing else "CoLM"
    chat = "with chat template" if checkpoint.text.chat_template else "raw completion"
    rows = [
        ("path", str(path)),
        ("kind", f"{kind}, chains {{{','.join(map(str, config.chains))}}}"),
        ("layers", str(config.num_layers)),
        ("dim / ffn", f"{config.dim} / {config.hidden_dim}"),
        ("heads", f"{config.num_heads} query, {config.num_kv_heads} kv, head dim {config.head_dim}"),
        ("vocabulary", f"{config.vocab_size}, head {'tied' if config.tie_embeddings else 'of its own'}"),
        ("context", f"{config.max_context} tokens, rope theta {config.rope_theta:g}"),
        ("rope scaling", "none" if config.rope_scaling is None else str(config.rope_scaling)),
        ("dtype", dtype_name(dtype)),
        ("text", chat if checkpoint.tokenizer_path else "token ids only, no tokenizer"),
        ("KV cache", f"{human_bytes(layout.token_bytes)} per token, the same at every scale"),
    ]
    rows += [(f"scale {scale}", f"{count:,} parameters") for scale, count in scales.items()]
    for name, value in rows:
        typer.echo(f"{name:<13} {value}")
