"""Generate the stubs of colm.wire.v1 from the .proto files beside this script.

Usage: python proto/generate.py [DEST]   (DEST defaults to the repository root)
"""

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).parent


def generate(dest: Path) -> None:
    """Write _pb2.py, _pb2.pyi and _pb2_grpc.py below `dest`; the import path is the .proto's path."""
    sources = sorted(str(path.relative_to(HERE)) for path in HERE.rglob("*.proto"))
    includes = [f"-I{HERE}", f"-I{files('grpc_tools') / '_proto'}"]
    outputs = [f"--python_out={dest}", f"--pyi_out={dest}", f"--grpc_python_out={dest}"]
    if code := protoc.main(["protoc", *includes, *outputs, *sources]):
        raise SystemExit(code)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent)
