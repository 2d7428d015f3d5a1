"""Whom the members of a folder trust: an authority, two while the cluster's own gives way to another, and whom not."""

import fcntl
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from cluster.state import write_private
from colm.errors import ClusterError, ConfigError
from colm.wire.authority import Authority
from colm.wire.certificates import pem_of, read_certificates
from colm.wire.members import Member
from colm.wire.tls_files import CA_FILE, REVOKED_FILE, certificate_path, read_revoked

CA_KEY_FILE = "ca_key.pem"
"""Key of the cluster's authority, or a link to it; only where certificates are issued."""
OVERLAP_FILE = "ca_overlap.pem"
"""The old authority's word for the new one. Until its end both are trusted; members show it behind their own."""


def read_authority(folder: Path, now: datetime) -> Authority:
    """The authority that signs in a folder, which has its key.

    Raises:
        ConfigError: it cannot be used, or its key is not here.
    """
    signs = Authority.read(folder / CA_FILE, folder / CA_KEY_FILE, now)
    overlap = read_overlap(folder)
    if overlap is None or overlap.not_valid_after_utc <= now or not _is_for(overlap, signs.certificate):
        return signs
    return replace(signs, above=(overlap,))


def read_overlap(folder: Path) -> x509.Certificate | None:
    """The old authority's word for the new one; None unless one has taken the other's place lately.

    Raises:
        ConfigError: it cannot be read.
    """
    path = folder / OVERLAP_FILE
    return read_certificates(path)[0] if path.exists() else None


def issue(folder: Path, authority: Authority, members: Collection[Member], now: datetime) -> None:
    """Write a fresh key and certificate of each member into its file, which is replaced at once."""
    for member in members:
        write_private(certificate_path(folder, member), authority.issue(member, now).pem.decode())


def copy_trust(folder: Path, first: Path) -> None:
    """Trust in a folder what the first machine's trusts, and refuse whom that refuses.

    Raises:
        OSError: a file cannot be read or written.
    """
    write_private(folder / CA_FILE, (first / CA_FILE).read_text())
    for name in (OVERLAP_FILE, REVOKED_FILE):
        if (path := first / name).exists():
            write_private(folder / name, path.read_text())
        else:
            (folder / name).unlink(missing_ok=True)


def rotate_authority(folder: Path, overlap: timedelta, now: datetime) -> datetime | None:
    """Put a new authority in the place of the cluster's own, and issue what the folder's members show by the new one.

    Nothing fails meanwhile. Whoever trusts the old authority alone, on another machine or with a copy of `ca.pem`,
    trusts what the new one signs by the old one's word; and this folder trusts both.

    Args:
        folder: with the authority's key.
        overlap: how long the old one is trusted; zero for not at all, also one of an earlier rotation.
        now: the time.

    Returns:
        When the old one ends; None without an overlap.

    Raises:
        ClusterError: the folder cannot be written.
        ConfigError: the authority is the operator's own, or cannot be used, or an overlap has not ended yet.
    """
    with alone(folder):
        old, new = read_authority(folder, now), Authority.new(now)
        if (folder / CA_KEY_FILE).is_symlink():
            raise ConfigError(
                f"the authority in {folder} is your own, and only the cluster's is rotated: `colm down`, then `colm "
                "up` or `colm secrets` with --ca-certificate and --ca-key of another one"
            )
        if overlap and old.above:
            until = old.above[0].not_valid_after_utc
            raise ConfigError(
                f"the authority before this one is trusted until {until:%Y-%m-%d %H:%M} UTC; wait for that, or give "
                "--overlap-days 0, which ends both"
            )
        try:
            # Whoever is killed between two files leaves what works. The new one signs once its key is there, last.
            if overlap:
                vouched = old.vouch_for(new, now + overlap, now)
                write_private(folder / OVERLAP_FILE, pem_of([vouched]).decode())
            else:
                (folder / OVERLAP_FILE).unlink(missing_ok=True)
            trusted = [new.certificate, *read_certificates(folder / CA_FILE)]
            write_private(folder / CA_FILE, pem_of(trusted).decode())
            write_private(folder / CA_KEY_FILE, new.key_pem.decode())
            present = [member for member in Member if certificate_path(folder, member).exists()]
            signs = read_authority(folder, now)
            issue(folder, signs, present, now)
            if not overlap:
                write_private(folder / CA_FILE, new.certificate_pem.decode())
        except OSError as err:
            raise unwritable(folder, err) from err
        return signs.above[0].not_valid_after_utc if signs.above else None


def end_overlap(folder: Path, now: datetime) -> bool:
    """Trust an old authority no more whose time is over, or a new one whose key was never written; needs no key.

    Returns:
        Whether there was one.

    Raises:
        ClusterError: the folder cannot be written.
        ConfigError: a file cannot be read.
    """
    with alone(folder):
        overlap = read_overlap(folder)
        if overlap is None:
            return False
        has_key = (folder / CA_KEY_FILE).exists()
        is_void = has_key and not _is_for(overlap, read_authority(folder, now).certificate)
        if overlap.not_valid_after_utc > now and not is_void:
            return False
        kept = [each for each in read_certificates(folder / CA_FILE) if _is_for(overlap, each) != is_void]
        try:
            write_private(folder / CA_FILE, pem_of(kept).decode())
            (folder / OVERLAP_FILE).unlink()
        except OSError as err:
            raise unwritable(folder, err) from err
        return True


def revoke(folder: Path, serial: int) -> None:
    """Refuse the calls of whoever shows the certificate of a serial number, from the next call on.

    Raises:
        ClusterError: the folder cannot be written.
        ConfigError: the file is damaged.
    """
    with alone(folder):
        serials = sorted(read_revoked(folder / REVOKED_FILE) | {serial})
        try:
            write_private(folder / REVOKED_FILE, "".join(f"{each:x}\n" for each in serials))
        except OSError as err:
            raise unwritable(folder, err) from err


def unwritable(folder: Path, err: OSError) -> ClusterError:
    """Why certificates cannot be replaced."""
    return ClusterError(f"cannot write into {folder}: {err.strerror}; certificates are renewed there")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time: all nodes of a machine look after the same folder.

    Raises:
        ClusterError: there is no such folder.
    """
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as err:
        raise ClusterError(f"cannot read {folder}: {err.strerror}; it must be the folder of `colm secrets`") from err
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _is_for(overlap: x509.Certificate, authority: x509.Certificate) -> bool:
    return overlap.public_key() == authority.public_key()
