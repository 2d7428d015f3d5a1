"""The `colm` command."""

import sys

import typer

from cluster.cli.certificates import register as register_certificates
from cluster.cli.cluster import register as register_cluster
from cluster.cli.models import register as register_models
from cluster.cli.submit import register as register_submit
from cluster.cli.tokens import register as register_tokens
from cluster.cli.top import register as register_top
from cluster.cli.trace import register as register_trace
from colm.errors import ColmError

app = typer.Typer(
    help="Long-context inference with CoLM-Air models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
register_models(app)
register_cluster(app)
register_submit(app)
register_top(app)
register_trace(app)
register_tokens(app)
register_certificates(app)


def main() -> None:
    """Run one command; a user's error becomes one line on stderr and exit status 1."""
    try:
        app()
    except ColmError as err:
        typer.echo(f"error: {err}", err=True)
        sys.exit(1)
