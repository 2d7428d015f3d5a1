"""What may import what, read from the source itself; docs/architecture.md has the table."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "colm_kernels": ROOT / "kernels" / "colm_kernels",
    "colm": ROOT / "colm",
    "prefill_node": ROOT / "prefill_node",
    "decode_node": ROOT / "decode_node",
    "cluster": ROOT / "cluster",
    "bench": ROOT / "bench",
    "tests": ROOT / "tests",
}
PRODUCT = ("colm_kernels", "colm", "prefill_node", "decode_node", "cluster")
MAX_LINES = 450

MAY_IMPORT = {
    "colm_kernels": set(),
    "colm": {"colm_kernels"},
    "prefill_node": {"colm_kernels", "colm"},
    "decode_node": {"colm_kernels", "colm"},
    "cluster": {"colm_kernels", "colm", "prefill_node", "decode_node"},
    "bench": {"colm_kernels", "colm", "prefill_node", "decode_node", "cluster"},
    "tests": {"colm_kernels", "colm", "prefill_node", "decode_node", "cluster", "bench"},
}

RAY = ("cluster/",)
GRPC = (
    "colm/wire/",
    "colm/client.py",
    "colm/upload.py",
    "prefill_node/service.py",
    "prefill_node/node.py",
    "decode_node/service.py",
    "decode_node/node.py",
    "decode_node/kv_receiver.py",
    "decode_node/kv_requests.py",
    "cluster/generation_service.py",
    "cluster/decode_calls.py",
    "cluster/ray_guard.py",
    "cluster/replicas/client_ports.py",
)

# Bookkeeping for property tests: no tensors, no network and no cluster, not even through their own imports.
PURE_MODULES = (
    "decode_node.page_pool",
    "decode_node.plan",
    "decode_node.scheduler",
    "decode_node.transfer_ledger",
    "prefill_node.job_policy",
    "colm.kv_position",
    "decode_node.stop_matcher",
    "colm.leases",
    "cluster.node_registry",
    "cluster.autoscaling.policy",
)


def sources(package: str) -> list[Path]:
    """A package's own files, without those that protoc generated."""
    return sorted(path for path in PACKAGES[package].rglob("*.py") if not path.is_relative_to(ROOT / "colm/wire/v1"))


PRODUCT_FILES = [path for package in PRODUCT for path in sources(package)]


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def package_of(path: Path) -> str:
    """Dotted package that relative imports of a file start from."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:-1] if parts[0] == "kernels" else parts[:-1])


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names of everything that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = package_of(path).split(".")
                module = ".".join([*base[: len(base) - node.level + 1], *filter(None, [module])])
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return frozenset(found)


def top(name: str) -> str:
    return name.split(".")[0]


def offenders(files: list[Path], names: set[str], allowed: tuple[str, ...] = ()) -> list[str]:
    """Files outside the allowed places that import one of the top-level names."""
    return [
        f"{place(path)}: {name}"
        for path in files
        for name in sorted(imports(path))
        if top(name) in names and not place(path).startswith(allowed or ("\0",))
    ]


def names_a_stub(name: str) -> bool:
    return "_pb2" in name or name.startswith("colm.wire.v1")


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_between_packages_go_one_way(package: str) -> None:
    foreign = set(PACKAGES) - {package} - MAY_IMPORT[package]
    assert offenders(sources(package), foreign) == []


def test_the_kernels_need_nothing_but_torch_and_triton() -> None:
    known = {*sys.stdlib_module_names, "colm_kernels", "torch", "triton"}
    files = [path for path in sources("colm_kernels") if not path.name.endswith("_adapter.py")]
    assert [name for path in files for name in imports(path) if top(name) not in known] == []


def test_triton_stays_with_the_gpu() -> None:
    assert offenders(PRODUCT_FILES, {"triton"}, ("kernels/colm_kernels/gpu/",)) == []


PICKLING = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "multiprocessing", "shelve"}


def test_no_socket_or_file_of_ours_is_read_as_python_objects() -> None:
    """Sockets carry protobuf messages and numbers, files text and numbers. Ray's own ports are another matter."""
    assert offenders(PRODUCT_FILES, PICKLING, ("kernels/",)) == []
    loads = {place(path) for path in PRODUCT_FILES for node in ast.walk(tree(path)) if is_torch_load(node)}
    assert loads == set()


def is_torch_load(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "ray.cloudpickle")


def test_the_operations_import_without_triton() -> None:
    code = (
        "import sys, colm_kernels.prefill_attention, colm_kernels.sparse_prefill_attention, colm_kernels.chain_linear;"
        "sys.stdout.write(str('triton' in sys.modules))"
    )
    assert run_python(code) == "False"


def test_ray_stays_in_the_cluster_and_the_replicas() -> None:
    assert offenders(PRODUCT_FILES, {"ray"}, RAY) == []


def test_grpc_stays_at_the_edges() -> None:
    assert offenders(PRODUCT_FILES, {"grpc", "grpc_health", "grpc_reflection"}, GRPC) == []


def test_protobuf_classes_stay_at_the_edges() -> None:
    files = [path for path in PRODUCT_FILES if not place(path).startswith(GRPC)]
    assert [f"{place(path)}: {name}" for path in files for name in imports(path) if names_a_stub(name)] == []


def test_peers_that_we_are_compared_with_stay_in_tests_and_bench() -> None:
    assert offenders(PRODUCT_FILES, {"transformers", "accelerate", "vllm", "llama_cpp", "onnxruntime"}) == []


def test_tools_stay_out_of_the_product() -> None:
    assert offenders(PRODUCT_FILES, {"pytest", "hypothesis", "grpc_tools"}) == []


def run_python(code: str) -> str:
    """Run code in a fresh process at the repository root, like a user's `python -c` there."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bookkeeping_brings_in_no_tensors_network_or_cluster() -> None:
    listed = ", ".join(PURE_MODULES)
    code = f"import sys, {listed}; sys.stdout.write(' '.join({{'torch', 'grpc', 'ray'}} & set(sys.modules)))"
    assert run_python(code) == ""


def test_a_command_waits_for_neither_torch_nor_ray_before_it_needs_them() -> None:
    """Bug: the options' types came from modules that compute, and `colm status` took two seconds to import PyTorch."""
    code = "import sys, cluster.cli; sys.stdout.write(' '.join({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    assert run_python(code) == ""


def test_colm_down_stops_a_cluster_without_pytorch() -> None:
    """Bug: what checks a model before it is served was imported with it, two seconds of processor time a time."""
    code = (
        "import sys, cluster.cli, cluster.teardown, cluster.deployment;"
        "sys.stdout.write(' '.join({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert run_python(code) == ""


def test_the_nodes_and_the_client_run_without_ray() -> None:
    code = (
        "import sys, colm.client, prefill_node.node, decode_node.node, prefill_node.__main__, decode_node.__main__;"
        "sys.stdout.write(str('ray' in sys.modules))"
    )
    assert run_python(code) == "False"


def test_the_front_door_knows_no_protocol() -> None:
    code = "import sys, cluster.front_door.front_door; sys.stdout.write(' '.join({'grpc', 'ray'} & set(sys.modules)))"
    assert run_python(code) == ""


@pytest.mark.parametrize("directory", ["proto", "kernels"])
def test_a_directory_named_like_a_foreign_package_is_no_package(directory: str) -> None:
    """Other projects call their packages `proto` and `kernels` too; an __init__.py here would hide theirs."""
    assert (ROOT / directory).is_dir()
    assert not (ROOT / directory / "__init__.py").exists()


def test_foreign_packages_import_from_the_repository_root() -> None:
    run_python("import google.api_core, transformers")


def test_whatever_chooses_variants_of_the_kernels_runs_under_the_sanitizers_too() -> None:
    choosing = {
        path
        for path in sources("tests")
        if {"colm_kernels.native.use_variant", "colm_kernels.native.available_variants"} & imports(path)
    }
    marked = {path for path in choosing if "\npytestmark = pytest.mark.kernels\n" in path.read_text(encoding="utf-8")}
    assert choosing
    assert [place(path) for path in sorted(choosing - marked)] == []


def calls_print(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{place(path)}:{node.lineno}"


def test_the_product_does_not_print() -> None:
    assert [where for path in PRODUCT_FILES for where in calls_print(path)] == []


def test_every_file_can_be_read_in_one_sitting() -> None:
    lengths = {place(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PRODUCT_FILES}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def public(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Documented]]:
    """Public functions, classes and, inside those, methods."""
    for node in body:
        if isinstance(node, Documented) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


def test_everything_public_has_a_docstring() -> None:
    found = [(path, name, node) for path in PRODUCT_FILES for name, node in public(tree(path).body, "")]
    assert len(found) > 100
    assert [f"{place(path)}: {name}" for path, name, node in found if ast.get_docstring(node) is None] == []


def test_every_file_says_what_it_is_for() -> None:
    files = [path for path in PRODUCT_FILES if path.read_text(encoding="utf-8").strip()]
    assert [place(path) for path in files if ast.get_docstring(tree(path)) is None] == []


NAMED_FILE = re.compile(r"`([\w/]+\.py|[\w/]+/)[:`]")
FOLLOWS = re.compile(r"`([\w/]+/)\w+\.py[^`]*`, `(\w+\.py)[:`]")


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md", "kernels/README.md", "proto/README.md"])
def test_the_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    beside = {name: folder for folder, name in FOLLOWS.findall(text)}
    places = (ROOT, (ROOT / page).parent, ROOT / "kernels" / "colm_kernels")
    named = [f"{beside.get(name, '')}{name}" for name in NAMED_FILE.findall(text)]
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


def test_the_adrs_name_files_that_exist() -> None:
    pages = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert pages
    missing = [
        f"{page.name}: {name}"
        for page in pages
        for name in NAMED_FILE.findall(page.read_text(encoding="utf-8"))
        if "/" in name and not (ROOT / name).exists()
    ]
    assert missing == []


def test_no_two_test_files_share_a_name() -> None:
    """Without packages, pytest imports them by their names alone, and collects none of the second."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
