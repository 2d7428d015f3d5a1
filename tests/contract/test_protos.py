"""The .proto files, the stubs made from them, and the rules both follow."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.message import Message
from grpc_tools import protoc

from colm.wire import status
from colm.wire.v1 import common_pb2, decode_service_pb2, generation_service_pb2, kv_transfer_service_pb2

ROOT = Path(__file__).parents[2]
FILES: list[FileDescriptor] = [
    module.DESCRIPTOR for module in (common_pb2, decode_service_pb2, generation_service_pb2, kv_transfer_service_pb2)
]


def messages(parents: list[Descriptor]) -> Iterator[Descriptor]:
    for parent in parents:
        yield parent
        yield from messages(list(parent.nested_types))


MESSAGES = [message for file in FILES for message in messages(list(file.message_types_by_name.values()))]
ENUMS: list[EnumDescriptor] = [enum for file in FILES for enum in file.enum_types_by_name.values()]
ENUMS += [enum for message in MESSAGES for enum in message.enum_types]
METHODS: list[MethodDescriptor] = [
    method for file in FILES for service in file.services_by_name.values() for method in service.methods
]


DECLARED = ("message_type", "nested_type", "enum_type", "service", "field", "value", "method")
"""Fields of protobuf's own descriptors that hold what a .proto file declares."""


def declarations(parent: Message, path: tuple[int, ...] = (), name: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, path as protobuf's source information writes it) of everything that is declared below."""
    for kind in parent.DESCRIPTOR.fields:
        for index, child in enumerate(getattr(parent, kind.name) if kind.name in DECLARED else ()):
            below, full = (*path, kind.number, index), f"{name}.{child.name}".lstrip(".")
            yield full, below
            yield from declarations(child, below, full)


def generated_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and "_pb2" in path.name}


def test_the_checked_in_stubs_are_those_of_the_protos(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "proto/generate.py", tmp_path], cwd=ROOT, check=True, timeout=60)
    fresh, checked_in = generated_files(tmp_path / "colm/wire/v1"), generated_files(ROOT / "colm/wire/v1")
    assert fresh.keys() == checked_in.keys()
    assert [name for name in fresh if fresh[name] != checked_in[name]] == []


def test_every_proto_file_is_looked_at_here() -> None:
    names = {path.relative_to(ROOT / "proto").as_posix() for path in (ROOT / "proto").rglob("*.proto")}
    assert {file.name for file in FILES} == names


@pytest.mark.parametrize("file", FILES, ids=lambda file: Path(file.name).stem)
def test_the_package_is_the_path(file: FileDescriptor) -> None:
    assert file.package == "colm.wire.v1"
    assert Path(file.name).parent.as_posix() == "colm/wire/v1"


def test_everything_declared_has_a_comment(tmp_path: Path) -> None:
    described = tmp_path / "described"
    names = [file.name for file in FILES]
    arguments = ["-I", str(ROOT / "proto"), "--include_source_info", f"--descriptor_set_out={described}"]
    assert protoc.main(["protoc", *arguments, *names]) == 0
    bare = []
    for file in FileDescriptorSet.FromString(described.read_bytes()).file:
        comments = {tuple(place.path): place.leading_comments.strip() for place in file.source_code_info.location}
        bare += [name for name, path in declarations(file) if not comments.get(path)]
    assert bare == []


@pytest.mark.parametrize("enum", ENUMS, ids=lambda enum: enum.name)
def test_zero_of_an_enum_is_unspecified(enum: EnumDescriptor) -> None:
    zero = enum.values_by_number[0].name
    assert zero.endswith("_UNSPECIFIED")
    prefix = zero.removesuffix("UNSPECIFIED")
    assert all(value.name.startswith(prefix) for value in enum.values)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_every_call_has_messages_of_its_own(method: MethodDescriptor) -> None:
    assert (method.input_type.name, method.output_type.name) == (f"{method.name}Request", f"{method.name}Response")
    users = [m for m in METHODS if {m.input_type, m.output_type} & {method.input_type, method.output_type}]
    assert users == [method]


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.services_by_name], ids=lambda file: Path(file.name).stem
)
def test_services_are_named_as_such(file: FileDescriptor) -> None:
    assert all(name.endswith("Service") for name in file.services_by_name)


def test_the_payload_of_a_tile_is_the_last_field() -> None:
    """The codec writes and reads it behind everything else."""
    fields = kv_transfer_service_pb2.PullKvResponse.DESCRIPTOR.fields
    assert max(fields, key=lambda field: field.number).name == "payload"


def test_every_error_has_the_status_that_the_contract_says() -> None:
    """Bug: the page had no INTERNAL."""
    proto = next((ROOT / "proto").rglob("common.proto")).read_text()
    by_kind = {common_pb2.ErrorDetail.Kind.Name(kind): code.name for _, code, kind in status._BY_ERROR}
    of_kind = {kind: code for code, kind in re.findall(r"; ([A-Z_]+)\.\n\s+(KIND_\w+) =", proto)}
    assert of_kind == by_kind | {"KIND_INTERNAL": "INTERNAL"}
    page = (ROOT / "proto" / "README.md").read_text()
    table = page[page.index("| status | meaning |") :]
    assert [
        code for code in sorted(set(of_kind.values())) if f"| `{code}`" not in table and f", `{code}`" not in table
    ] == []
