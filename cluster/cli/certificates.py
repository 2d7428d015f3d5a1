"""colm secrets, and colm certificates show, rotate: keys and certificates, made and renewed without a restart."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.cli.output import DEFAULT_STATE_DIR, JsonFlag, StateDir, note, print_json
from cluster.state import SECRETS, ClusterState
from colm.clock import utc_now
from colm.errors import ConfigError

Folder = Annotated[
    Path | None, typer.Option("--secrets", help="Folder of `colm secrets`; by default that of this machine's cluster.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("secrets")(secrets)
    certificates = typer.Typer(help="Certificates of the gateway and the nodes.", no_args_is_help=True)
    certificates.command("show")(show)
    certificates.command("rotate")(rotate)
    app.add_typer(certificates, name="certificates")


def secrets(
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    ca_certificate: Annotated[Path | None, typer.Option(help="Your own authority, which then signs; PEM.")] = None,
    ca_key: Annotated[Path | None, typer.Option(help="Its private key, which stays where it is.")] = None,
    first: Annotated[
        Path | None, typer.Option("--from", help="Folder of the first machine: make another machine's, with own keys.")
    ] = None,
    role: Annotated[
        list[str] | None, typer.Option(help="With --from: gateway, decode or prefill; may be repeated. All by default.")
    ] = None,
) -> None:
    """Make the tokens, keys and certificates of a cluster of several machines.

    The first folder has the authority's key, and stays on one machine. `colm secrets OTHER --from FIRST --role decode`
    makes the folder of another machine, with keys of its own for what runs there; copy it to the same path there.
    """
    from cluster.secret_files import write_machine_secrets, write_secrets
    from colm.wire.members import Member

    roles = {member.value: member for member in (Member.GATEWAY, Member.DECODE, Member.PREFILL)}
    if unknown := [word for word in role or () if word not in roles]:
        raise ConfigError(f"--role={unknown[0]!r} is not one of {', '.join(roles)}")
    if (ca_certificate is None) != (ca_key is None):
        raise ConfigError("--ca-certificate and --ca-key need one another; give both, or neither")
    if first is not None:
        if ca_certificate is not None:
            raise ConfigError("--ca-certificate with --from: the first folder has its authority; leave one of them out")
        write_machine_secrets(folder, first, {roles[word] for word in role or roles})
    elif role:
        raise ConfigError("--role needs --from; the first folder has certificates of all roles")
    else:
        write_secrets(folder, None if ca_certificate is None or ca_key is None else (ca_certificate, ca_key))
    note(f"wrote {folder}: whoever can read it can use the cluster")


def show(secrets: Folder = None, state_dir: StateDir = DEFAULT_STATE_DIR, json: JsonFlag = False) -> None:
    """Show whose certificates there are, and until when they are valid."""
    from cluster.certificates import authority_validity, members_validity, own_validity

    folder, now = _folder(secrets, state_dir), utc_now()
    found = [authority_validity(folder), *members_validity(folder)]
    state = ClusterState.read(state_dir) if secrets is None else None
    if state is not None and state.own_certificate is not None:
        found.append(own_validity(Path(state.own_certificate)))
    if json:
        rows = [{"name": v.name, "file": str(v.path), "end": v.end.isoformat(), "is_due": v.is_due(now)} for v in found]
        print_json({"certificates": rows})
        return
    table = Table("of", "file", "valid until", "days left", title=str(folder))
    for validity in found:
        left_days = str((validity.end - now).days)
        table.add_row(validity.name, validity.path.name, f"{validity.end:%Y-%m-%d %H:%M}", left_days)
    Console().print(table)


def rotate(
    secrets: Folder = None,
    first: Annotated[
        Path | None, typer.Option("--from", help="Folder with the authority's key, where --secrets has none.")
    ] = None,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    json: JsonFlag = False,
) -> None:
    """Give the gateway and the nodes fresh keys and certificates.

    A cluster that runs uses them from the next connection on; calls that run go on. It renews its certificates by
    itself where the authority's key is at hand. Where it is not, rotate and copy the folder.
    """
    from cluster.certificates import renew

    folder = _folder(secrets, state_dir)
    fresh = renew(folder, first or folder, utc_now(), only_due=False)
    if json:
        print_json({"renewed": [{"name": v.name, "file": str(v.path), "end": v.end.isoformat()} for v in fresh]})
        return
    for validity in fresh:
        note(f"{validity.path}: valid until {validity.end:%Y-%m-%d %H:%M}")


def _folder(secrets: Path | None, state_dir: Path) -> Path:
    folder = state_dir / SECRETS if secrets is None else secrets
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not there; run `colm up`, or give --secrets DIR for one of `colm secrets`")
    return folder
