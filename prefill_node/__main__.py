"""Run one prefill node by hand: `python -m prefill_node --model DIR`."""

from pathlib import Path
from typing import Annotated

import typer

from colm.node_cli import Host, Insecure, Port, TlsDir, TokenFile, command, read_security, run_node
from colm.placement import Placement
from colm.settings import DtypeSettings, PlacementSettings
from colm.wire.members import Member
from prefill_node.node import PrefillNode, PrefillOptions
from prefill_node.settings import PrefillSettings


@command
async def main(
    *,
    model: Annotated[Path, typer.Option(help="Checkpoint directory; only chain 1 is read.")],
    host: Host = "127.0.0.1",
    port: Port = 0,
    placement: PlacementSettings,
    computation: DtypeSettings,
    settings: PrefillSettings,
    token_file: TokenFile = None,
    tls_dir: TlsDir = None,
    insecure: Insecure = False,
) -> None:
    """Serve chain 1 of a model to decode nodes; prints its address once it is ready."""
    options = PrefillOptions(
        model_path=str(model),
        placement=Placement.of(placement.resolved_device, computation.dtype, placement.num_threads),
        settings=settings,
        host=host,
        port=port,
    )
    security = read_security(token_file, tls_dir, Member.PREFILL, [host], insecure=insecure)
    await run_node(PrefillNode(options, security))


if __name__ == "__main__":
    typer.run(main)
