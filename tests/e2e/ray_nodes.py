"""A Ray of several nodes on this machine, started as its users do: with `ray start`."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from ray.util import get_node_ip_address

from cluster.local_ray import ENVIRONMENT, WITHOUT, address_in, mark_of, port_words, stop_ray
from cluster.state import write_private
from colm.wire.security import new_token
from tests.e2e.conftest import AS_NICE_AS_TESTS, until

_START_S = 240
_NODES = """
import json, ray
ray.init(address="{address}", log_to_driver=False, logging_level="ERROR")
print(json.dumps([[node["NodeID"], node["Resources"]] for node in ray.nodes() if node["Alive"]]))
"""

_KEPT = """
import sys, ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list
ray.init(address="{address}", log_to_driver=False, logging_level="ERROR")
for namespace in (None, "serve"):
    for key in _internal_kv_list(b"", namespace=namespace):
        sys.stdout.buffer.write(key + (_internal_kv_get(key, namespace=namespace) or b""))
"""


@dataclass(frozen=True)
class RayNodes:
    """A head node and others, and the environment that its users need."""

    address: str
    environment: dict[str, str]

    def kept(self) -> bytes:
        """Everything in Ray's key-value store."""
        return self._run(_KEPT)

    def _run(self, script: str) -> bytes:
        return subprocess.run(
            [sys.executable, "-c", script.format(address=self.address)],
            env=os.environ | self.environment,
            stdout=subprocess.PIPE,
            check=True,
            timeout=_START_S,
        ).stdout

    def ids(self) -> dict[str, str]:
        """Ray's names of the nodes, by the resources that they carry."""
        nodes = json.loads(self._run(_NODES).splitlines()[-1])
        return {resource: name for name, resources in nodes for resource in resources}


@contextmanager
def ray_nodes(*carried: Mapping[str, int], demands_token: bool, has_tls: bool = False) -> Iterator[RayNodes]:
    """A head without resources of ours and a node for each mapping of resources. All of it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="colm-ray-") as name:  # short, for the paths of sockets
        folder = Path(name)
        token = folder / "token"
        write_private(token, new_token())
        environment = {"RAY_AUTH_MODE": "token" if demands_token else "disabled", "RAY_AUTH_TOKEN_PATH": str(token)}
        if has_tls:
            environment |= write_certificates(folder)
        words = ("--head", *WITHOUT, f"--temp-dir={folder / 'r'}", "--port=0", *port_words())
        try:
            _start(folder / "head.log", token, environment, *words)
            until(lambda: address_in(folder / "r") is not None, _START_S)
            address = address_in(folder / "r")
            assert address is not None
            for number, resources in enumerate(carried):
                words = (f"--address={address}", f"--resources={json.dumps(resources)}", WITHOUT[1], *port_words())
                _start(folder / f"node{number}.log", token, environment, *words)
            yield RayNodes(address, environment)
        finally:
            stop_ray(token)


def write_certificates(folder: Path) -> dict[str, str]:
    """An authority and a certificate of this machine, as Ray's own TLS asks for them; returns the environment."""
    now, key, authority_key = datetime.now(UTC), *(ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    addresses = [x509.IPAddress(ip_address(name)) for name in ("127.0.0.1", get_node_ip_address())]

    def certificate(name: str, public_key: Any) -> x509.CertificateBuilder:
        names = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (name, "authority"))
        subject, issuer = names
        builder = x509.CertificateBuilder(issuer, subject, public_key, x509.random_serial_number())
        return builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))

    authority = certificate("authority", authority_key.public_key()).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    node = (
        certificate("node", key.public_key())
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
    )
    pem = serialization.Encoding.PEM
    files = {
        "RAY_TLS_CA_CERT": authority.sign(authority_key, hashes.SHA256()).public_bytes(pem),
        "RAY_TLS_SERVER_CERT": node.sign(authority_key, hashes.SHA256()).public_bytes(pem),
        "RAY_TLS_SERVER_KEY": key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    }
    for name, data in files.items():
        write_private(folder / name, data.decode())
    return {"RAY_USE_TLS": "1"} | {name: str(folder / name) for name in files}


def _start(log: Path, token: Path, environment: Mapping[str, str], *words: str) -> None:
    """Run `ray start` until its node runs."""
    with log.open("wb") as output:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", *words]
        started = subprocess.Popen(
            [*command, "--disable-usage-stats"],
            env=os.environ | AS_NICE_AS_TESTS | ENVIRONMENT | environment | mark_of(token),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    until(lambda: "Ray runtime started" in log.read_text() or started.poll() is not None, _START_S, log.read_text)
    assert started.poll() is None, log.read_text()
