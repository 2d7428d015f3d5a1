"""Run one decode node by hand: `python -m decode_node --model DIR --prefill HOST:PORT`."""

from pathlib import Path
from typing import Annotated

import typer

from colm.clock import MonotonicClock
from colm.node_cli import Host, Insecure, Port, TlsDir, TokenFile, command, read_security, run_node
from colm.placement import Placement
from colm.settings import DtypeSettings, PlacementSettings
from colm.wire.endpoint import host_of
from colm.wire.members import Member
from decode_node.node import DecodeNode, DecodeOptions
from decode_node.prefill_pool import StaticPrefillPool
from decode_node.settings import DecodeSettings, PrefillPoolSettings


@command
async def main(
    *,
    model: Annotated[Path, typer.Option(help="Checkpoint directory; all chains are read.")],
    prefill: Annotated[list[str], typer.Option(help="host:port of a prefill node; may be repeated.")],
    host: Host = "127.0.0.1",
    port: Port = 0,
    placement: PlacementSettings,
    computation: DtypeSettings,
    settings: DecodeSettings,
    of_prefill: PrefillPoolSettings,
    token_file: TokenFile = None,
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
) -> None:
    """Serve a model at any scale over keys and values from prefill nodes; prints its address once it is ready."""
    options = DecodeOptions(
        model_path=str(model),
        placement=Placement.of(placement.resolved_device, computation.dtype, placement.num_threads),
        settings=settings,
        host=host,
        port=port,
    )
    pool = StaticPrefillPool(
        prefill, MonotonicClock(), max_streams=of_prefill.max_streams, max_waiting=of_prefill.max_queued
    )
    security = read_security(token_file, tls_dir, Member.DECODE, [host, *map(host_of, prefill)], insecure=insecure)
    await run_node(DecodeNode(options, security, pool))


if __name__ == "__main__":
    typer.run(main)
