"""What other machines will see of a cluster: looked at, and refused or called insecure, before anything starts."""

from collections.abc import Callable
from pathlib import Path

from cluster.options import ClusterConfig, GatewaySection
from cluster.security.secret_files import OwnCertificate, SecretFiles
from colm.clock import utc_now
from colm.errors import ConfigError
from colm.wire.certificates import covers, dialled_name, is_open_to_group, names_of, read_pair
from colm.wire.endpoint import is_loopback, is_wildcard
from colm.wire.tls_files import CA_FILE


def require_encryption(config: ClusterConfig) -> None:
    """Refuse plaintext beyond this machine that nobody has called insecure."""
    section, host, address = config.security, config.gateway.host, config.ray.address
    if section.tls == "auto" or section.insecure:
        return
    if not is_loopback(host):
        where = f"gateway.host={host!r}"
    elif address is not None:
        where = f"ray.address={address!r}"
    else:
        return
    raise ConfigError(
        f"security.tls='off' with {where} would send tokens and text to other machines in plaintext; leave tls on, or "
        "set security.insecure = true"
    )


def own_certificate(gateway: GatewaySection, say: Callable[[str], None]) -> OwnCertificate | None:
    """The operator's own certificate for clients, looked at before anything starts.

    Raises:
        ConfigError: names the option, the file and what is wrong with it.
    """
    if gateway.tls_certificate is None or gateway.tls_key is None:
        return None
    own = OwnCertificate(certificate=str(gateway.tls_certificate.absolute()), key=str(gateway.tls_key.absolute()))
    try:
        leaf = read_pair(Path(own.certificate), Path(own.key), utc_now()).leaf
        dialled_name(leaf)
    except ConfigError as err:
        raise ConfigError(f"gateway.tls_certificate and gateway.tls_key: {err}") from err
    if not is_wildcard(host := gateway.host) and not is_loopback(host) and not covers(leaf, host):
        raise ConfigError(
            f"gateway.tls_certificate={own.certificate!r} is for {', '.join(names_of(leaf))} and not for "
            f"gateway.host={host!r}; clients would refuse it"
        )
    if is_open_to_group(Path(own.key)):
        say(f"insecure: the group of {own.key} may read it; chmod it to 600")
    return own


def advice_to_clients(config: ClusterConfig, secrets: SecretFiles) -> str | None:
    """What clients of other machines need to trust the gateway; None where there are none, or no TLS."""
    if is_loopback(config.gateway.host) or not secrets.has_tls:
        return None
    if secrets.own_certificate is None:
        return f"clients elsewhere: colm submit --ca-file, with a copy of {Path(secrets.folder) / CA_FILE}"
    return "clients elsewhere: colm submit --system-ca, or --ca-file and --server-name for an authority of your own"
