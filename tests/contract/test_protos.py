"""The contract: stubs match the protos, enums have a zero, and nothing that is out there is renumbered."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FieldDescriptor
from pagewire.v1 import common_pb2, decode_pb2, inference_pb2, kv_channel_pb2, prefill_pb2, worker_pb2

ROOT = Path(__file__).parents[2]
MODULES = (common_pb2, decode_pb2, inference_pb2, kv_channel_pb2, prefill_pb2, worker_pb2)
SERVICES = {
    "DecodeService": {"Reserve", "Decode", "Stop", "Feed"},
    "InferenceService": {
        "Generate",
        "ListModels",
        "Status",
        "Metrics",
        "DeltaFeed",
        "Tokenize",
        "Detokenize",
        "TokenizerInfo",
        "Embed",
        "ResetPrefixCache",
        "ServerInfo",
        "Explain",
    },
    "KvChannelService": {"Connect", "Fetch"},
    "PrefillService": {"Prefill", "Embed"},
    "WorkerService": {"Info", "Stats", "Snapshot", "Drain", "SetRole", "ResetPrefixCache", "Metrics"},
}


def test_committed_stubs_are_what_the_protos_generate(tmp_path: Path) -> None:
    """Somebody who edits a proto and forgets `make protos` is told here."""
    protos = sorted(str(path) for path in (ROOT / "protos/pagewire/v1").glob("*.proto"))
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    command = [sys.executable, "-P", "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}", *outputs, *protos]
    subprocess.run(command, check=True)
    generated = {path.name: path.read_text() for path in (tmp_path / "pagewire/v1").iterdir()}
    assert len(generated) == 3 * len(protos)
    for name, text in generated.items():
        assert (ROOT / "protos/pagewire/v1" / name).read_text() == text, f"{name} is stale: run `make protos`"


def test_services_and_methods_are_the_published_ones() -> None:
    found = {s.name: set(s.methods_by_name) for m in MODULES for s in m.DESCRIPTOR.services_by_name.values()}
    assert found == SERVICES


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.DESCRIPTOR.name)
def test_every_enum_has_an_unspecified_zero(module: object) -> None:
    for enum in module.DESCRIPTOR.enum_types_by_name.values():  # type: ignore[attr-defined]
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED")


def test_field_numbers_are_the_published_ones() -> None:
    """A field may be added; one that is out there keeps its number and type (tests/contract/fields.txt)."""
    lines = []
    for module in MODULES:
        proto = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(proto)
        for message in proto.message_type:
            lines += [_describe(message.name, field) for field in message.field]
    published = set((ROOT / "tests/contract/fields.txt").read_text().splitlines())
    assert published <= set(lines), "a published field is gone or changed; make a v2 instead"
    assert set(lines) <= published, "new fields: add these lines to fields.txt: " + "\n".join(set(lines) - published)


def _describe(message: str, field: descriptor_pb2.FieldDescriptorProto) -> str:
    kind = field.type_name or descriptor_pb2.FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    repeated = "repeated " if field.label == FieldDescriptor.LABEL_REPEATED else ""
    return f"{message}.{field.name} = {field.number} {repeated}{kind}"


@pytest.mark.parametrize("arguments", [["lint"], ["build", "-o", "/dev/null"]])
def test_buf_accepts_the_protos(arguments: list[str]) -> None:
    buf = shutil.which("buf") or str(ROOT / "node_modules/.bin/buf")
    if not Path(buf).exists():
        pytest.skip("buf is not installed (npm install @bufbuild/buf)")
    done = subprocess.run([buf, *arguments], cwd=ROOT / "protos", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_buf_finds_no_breaking_change() -> None:
    buf = shutil.which("buf") or str(ROOT / "node_modules/.bin/buf")
    if not Path(buf).exists():
        pytest.skip("buf is not installed (npm install @bufbuild/buf)")
    command = [buf, "breaking", "--against", str(ROOT / "protos/base.binpb")]
    done = subprocess.run(command, cwd=ROOT / "protos", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
