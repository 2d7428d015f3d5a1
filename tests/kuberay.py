"""KubeRay's schema of its resources, as its CRDs publish it, and what a manifest has against it.

`tests/kuberay.json` is data of KubeRay 1.7.0 (https://github.com/ray-project/kuberay, Apache License 2.0): the schemas
of version v1 in `helm-chart/kuberay-operator/crds/`, without their status, each part that occurs often written once.
`python -m tests.kuberay VERSION CRD.yaml ...` writes it anew from a release's files.
"""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

import yaml
from jsonschema import Draft202012Validator

DATA: Final = Path(__file__).with_name("kuberay.json")
_SMALLEST_PART: Final = 120
"""Characters; smaller parts are written where they occur."""


def problems(manifest: dict[str, Any]) -> list[str]:
    """What Kubernetes would refuse of a resource of KubeRay, unknown fields included; each as `where: what`."""
    data = json.loads(DATA.read_text())
    schema = {"$ref": data["kinds"][manifest["kind"]], "$defs": data["$defs"]}
    found = Draft202012Validator(schema).iter_errors(manifest)
    return sorted(f"{'.'.join(map(str, each.absolute_path))}: {each.message}" for each in found)


def _write(version: str, crds: list[Path]) -> None:
    schemas = {}
    for crd in crds:
        spec = yaml.safe_load(crd.read_text())["spec"]
        (published,) = (each["schema"]["openAPIV3Schema"] for each in spec["versions"] if each["name"] == "v1")
        published["properties"].pop("status", None)
        schemas[spec["names"]["kind"]] = _strict(published)
    seen: Counter[str] = Counter()
    for schema in schemas.values():
        _count(schema, seen)
    parts: dict[str, Any] = {}
    kinds = {kind: _shared(schema, seen, parts, is_root=True)["$ref"] for kind, schema in schemas.items()}
    comment = f"KubeRay {version}, Apache License 2.0; tests/kuberay.py says what was done to it"
    DATA.write_text(json.dumps({"$comment": comment, "kinds": kinds, "$defs": parts}, separators=(",", ":")) + "\n")


def _strict(schema: Any) -> Any:
    """The same for JSON Schema, with Kubernetes' own words left out and unknown fields refused."""
    if not isinstance(schema, dict):
        return [_strict(each) for each in schema] if isinstance(schema, list) else schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {
        name: {key: _strict(value) for key, value in part.items()} if name == "properties" else _strict(part)
        for name, part in schema.items()
        if not name.startswith("x-kubernetes") and name not in ("description", "default", "format")
    }
    if "properties" in kept and not schema.get("x-kubernetes-preserve-unknown-fields"):
        kept.setdefault("additionalProperties", False)
    return kept


def _name(schema: Any) -> str:
    return hashlib.sha256(json.dumps(schema, sort_keys=True).encode()).hexdigest()[:8]


def _count(schema: Any, seen: Counter[str]) -> None:
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _count(part, seen)
    if isinstance(schema, dict):
        seen[_name(schema)] += 1


def _shared(schema: Any, seen: Counter[str], parts: dict[str, Any], *, is_root: bool = False) -> Any:
    if isinstance(schema, list):
        return [_shared(each, seen, parts) for each in schema]
    if not isinstance(schema, dict):
        return schema
    rest = {
        name: {key: _shared(each, seen, parts) for key, each in part.items()}
        if name == "properties"
        else _shared(part, seen, parts)
        for name, part in schema.items()
    }
    is_schema = isinstance(schema.get("type"), str)
    if not is_root and not (is_schema and seen[_name(schema)] > 1 and len(json.dumps(schema)) > _SMALLEST_PART):
        return rest
    parts[_name(schema)] = rest
    return {"$ref": f"#/$defs/{_name(schema)}"}


if __name__ == "__main__":
    _write(sys.argv[1], [Path(word) for word in sys.argv[2:]])
