"""colm secrets, and colm certificates show, rotate, revoke: made, renewed and refused without a restart."""

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.cli.output import DEFAULT_STATE_DIR, JsonFlag, StateDir, note, print_json
from cluster.state import SECRETS, ClusterState
from colm.clock import utc_now
from colm.errors import ConfigError
from colm.wire.tls_files import CA_FILE, REVOKED_FILE

if TYPE_CHECKING:
    from cluster.security.certificates import Validity

Folder = Annotated[
    Path | None, typer.Option("--secrets", help="Folder of `colm secrets`; by default that of this machine's cluster.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("secrets")(secrets)
    certificates = typer.Typer(help="Certificates of the gateway and the nodes.", no_args_is_help=True)
    certificates.command("show")(show)
    certificates.command("rotate")(rotate)
    certificates.command("revoke")(revoke)
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
    from cluster.security.secret_files import write_machine_secrets, write_secrets
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
    """Show whose certificates there are, who signed them, and until when they are valid."""
    from cluster.security.certificates import authorities_validity, members_validity, own_validity

    folder, now = _folder(secrets, state_dir), utc_now()
    found = [*authorities_validity(folder), *members_validity(folder)]
    state = ClusterState.read(state_dir) if secrets is None else None
    if state is not None and state.own_certificate is not None:
        found.append(own_validity(Path(state.own_certificate)))
    if json:
        print_json({"certificates": [_row(validity) | {"is_due": validity.is_due(now)} for validity in found]})
        return
    table = Table("of", "file", "valid until", "days left", "signed by", "serial", title=str(folder))
    for validity in found:
        left_days, until = str((validity.end - now).days), f"{validity.end:%Y-%m-%d %H:%M}"
        row = (validity.name, validity.path.name, until, left_days, validity.signed_by, f"{validity.serial:x}")
        table.add_row(*row)
    Console().print(table)


def _row(validity: "Validity") -> dict[str, object]:
    return {
        "name": validity.name,
        "file": str(validity.path),
        "end": validity.end.isoformat(),
        "signed_by": validity.signed_by,
        "serial": f"{validity.serial:x}",
    }


def rotate(
    secrets: Folder = None,
    first: Annotated[
        Path | None, typer.Option("--from", help="Folder with the authority's key, where --secrets has none.")
    ] = None,
    authority: Annotated[
        bool, typer.Option("--authority", help="Put a new authority in the place of the cluster's own, and sign by it.")
    ] = False,
    overlap_days: Annotated[
        int, typer.Option(min=0, help="With --authority: how long the old one is trusted too; 0 shuts its members out.")
    ] = 30,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    json: JsonFlag = False,
) -> None:
    """Give the gateway and the nodes fresh keys and certificates.

    A cluster that runs uses them from the next connection on; calls that run go on. It renews its certificates by
    itself where the authority's key is at hand. Where it is not, rotate with --from and copy the folder. After
    --authority do so for each other machine, and give clients elsewhere the new ca.pem, before the old authority ends.
    """
    from cluster.security.certificates import members_validity, renew
    from cluster.security.trust import rotate_authority

    folder, old_end = _folder(secrets, state_dir), None
    if authority:
        if first is not None:
            raise ConfigError("--authority with --from: the authority is rotated where its key is; leave --from out")
        old_end = rotate_authority(folder, timedelta(days=overlap_days), utc_now())
        fresh = members_validity(folder)
    else:
        fresh = renew(folder, first or folder, utc_now(), only_due=False)
    if json:
        print_json(
            {
                "renewed": [_row(validity) for validity in fresh],
                "old_authority_until": None if old_end is None else old_end.isoformat(),
            }
        )
        return
    for validity in fresh:
        note(f"{validity.path}: by {validity.signed_by}, valid until {validity.end:%Y-%m-%d %H:%M}")
    if old_end is not None:
        note(
            f"the old authority is trusted until {old_end:%Y-%m-%d %H:%M}; before that, for each other machine `colm "
            f"certificates rotate --secrets OTHER --from {folder}` and copy OTHER there; give clients elsewhere "
            f"{folder / CA_FILE}"
        )


def revoke(
    serial: Annotated[str, typer.Argument(help="As `colm certificates show` prints it.")],
    secrets: Folder = None,
    state_dir: StateDir = DEFAULT_STATE_DIR,
) -> None:
    """Refuse the calls of whoever shows a certificate, from the next call on and without a restart.

    Other machines learn it by `colm certificates rotate --from`, or a copy of the file.
    """
    from cluster.security.trust import revoke as refuse

    folder = _folder(secrets, state_dir)
    try:
        number = int(serial, 16)
    except ValueError:
        raise ConfigError(f"{serial!r} is no serial number in hex; `colm certificates show` prints them") from None
    refuse(folder, number)
    note(f"{folder / REVOKED_FILE}: {number:x} calls no more")


def _folder(secrets: Path | None, state_dir: Path) -> Path:
    folder = state_dir / SECRETS if secrets is None else secrets
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not there; run `colm up`, or give --secrets DIR for one of `colm secrets`")
    return folder
