"""Run one decode node by hand: `python -m decode_node --model DIR --prefill HOST:PORT`."""

from pathlib import Path
from typing import Annotated

import typer

from colm import defaults
from colm.clock import MonotonicClock
from colm.node_cli import TlsDir, TokenFile, guarded, read_security, run_node
from colm.placement import Placement
from decode_node.node import DecodeNode, DecodeOptions
from decode_node.prefill_pool import StaticPrefillPool


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint directory; all chains are read.")],
    prefill: Annotated[list[str], typer.Option(help="host:port of a prefill node; may be repeated.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free port.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda (the first GPU) or cuda:N.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="float32 or bfloat16; must equal the prefill nodes'. auto is the fastest on the device.")
    ] = "auto",
    page_tokens: Annotated[int, typer.Option(help="Tokens in a KV page.")] = defaults.PAGE_TOKENS,
    kv_cache_mib: Annotated[int, typer.Option(help="Memory for keys and values.")] = defaults.KV_CACHE_BYTES >> 20,
    num_threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    token_file: TokenFile = None,
    tls_dir: TlsDir = None,
) -> None:
    """Serve a model at any scale over keys and values from prefill nodes; prints its address once it is ready."""

    async def run() -> None:
        options = DecodeOptions(
            model_path=str(model),
            placement=Placement.of(device, dtype, num_threads),
            page_tokens=page_tokens,
            kv_cache_bytes=kv_cache_mib << 20,
            host=host,
            port=port,
        )
        await run_node(
            DecodeNode(options, read_security(token_file, tls_dir), StaticPrefillPool(prefill, MonotonicClock()))
        )

    guarded(run())


if __name__ == "__main__":
    typer.run(main)
