"""Fresh secrets of a cluster, in files."""

from pathlib import Path

from cluster.security.secret_files import SecretFiles, write_secrets


def secret_files(folder: Path) -> SecretFiles:
    """Tokens and certificates in a new folder within another one."""
    write_secrets(folder / "secrets")
    return SecretFiles(folder=str(folder / "secrets"), has_tls=True, has_client_token=True)
