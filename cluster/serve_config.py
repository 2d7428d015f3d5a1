"""The application as a config of Ray Serve's own, for whoever deploys such: KubeRay's RayService.

`colm config --serve` prints it. Serve then calls `application` on a machine of its Ray cluster, which builds what `colm
up` deploys.
"""

import json
from pathlib import Path
from typing import Any, Final

from cluster.options import ClusterConfig, load_config
from colm.errors import ConfigError

_IMPORT_PATH: Final = "cluster.serve_config:application"


def serve_config(config: ClusterConfig) -> str:
    """Serve's config, in JSON, which is YAML too. Only options that were set are in it.

    Raises:
        ConfigError: an option is missing without which no machine of a joined Ray could start.
    """
    _check(config)
    wanted = {
        "proxy_location": "Disabled",  # clients come to the gateway, which has its own ports (ADR 4)
        "applications": [
            {
                "name": config.ray.application,
                "route_prefix": None,
                "import_path": _IMPORT_PATH,
                "args": config.model_dump(mode="json", exclude_unset=True),
            }
            | ({"external_scaler_enabled": True} if config.scalings else {})  # the gateway is it (ADR 51)
        ],
    }
    return json.dumps(wanted, indent=2) + "\n"


def application(args: dict[str, dict[str, Any]]) -> Any:
    """Serve calls it with the options, section by section; returns what `colm up` deploys with the same.

    Raises:
        ClusterError, ConfigError: what `colm up` would refuse of the options, or of the Ray.
    """
    from cluster.application import build
    from cluster.deployment import check_is_closed
    from cluster.replicas.replica_numbers import kept_numbers
    from cluster.security.exposure import require_encryption
    from cluster.security.secret_files import OwnCertificate, SecretFiles

    config = load_config(
        None, {f"{section}.{name}": value for section in args for name, value in args[section].items()}
    )
    path, folder = _check(config)
    require_encryption(config)
    check_is_closed(config.ray)
    certificate, key = config.gateway.tls_certificate, config.gateway.tls_key
    # Its files are on the gateway's machine, which need not be this one: the gateway looks at them.
    own = None if certificate is None or key is None else OwnCertificate(certificate=str(certificate), key=str(key))
    secrets = SecretFiles.of(config.security, folder, clients_folder=folder, own_certificate=own)
    return build(config, path, secrets, kept=kept_numbers(config.ray.application) if config.scalings else {})


def _check(config: ClusterConfig) -> tuple[Path, Path]:
    """The folders of the model and of the secrets, which must be at the same place on every machine."""
    found = {"model.path": config.model.path, "security.folder": config.security.folder}
    found |= {f"model.variants.{variant}.path": each.path for variant, each in config.model.variants.items()}
    for name, path in found.items():
        if path is None:
            raise ConfigError(f"{name} is not set; Serve's config is for a Ray of several machines, which needs it")
        if not path.is_absolute():
            raise ConfigError(f"{name}={str(path)!r} must be a whole path, the same on every machine")
    model, folder, *_ = found.values()
    assert model is not None
    assert folder is not None
    return model, folder
