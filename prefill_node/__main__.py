"""Run one prefill node by hand: `python -m prefill_node --model DIR`."""

from pathlib import Path
from typing import Annotated

import typer
from colm_kernels.prefill_attention import Backend

from colm import defaults
from colm.node_cli import TlsDir, TokenFile, guarded, read_security, run_node
from colm.placement import Placement
from prefill_node.node import PrefillNode, PrefillOptions


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint directory; only chain 1 is read.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free port.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda (the first GPU) or cuda:N.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="float32 or bfloat16; must equal the decode nodes'. auto is the fastest on the device.")
    ] = "auto",
    tile_tokens: Annotated[int, typer.Option(help="Tokens computed and sent at a time.")] = defaults.TILE_TOKENS,
    attention_backend: Annotated[Backend, typer.Option(help="Of dense attention on CUDA.")] = "auto",
    num_threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    token_file: TokenFile = None,
    tls_dir: TlsDir = None,
) -> None:
    """Serve chain 1 of a model to decode nodes; prints its address once it is ready."""

    async def run() -> None:
        options = PrefillOptions(
            model_path=str(model),
            placement=Placement.of(device, dtype, num_threads),
            tile_tokens=tile_tokens,
            attention_backend=attention_backend,
            host=host,
            port=port,
        )
        await run_node(PrefillNode(options, read_security(token_file, tls_dir)))

    guarded(run())


if __name__ == "__main__":
    typer.run(main)
