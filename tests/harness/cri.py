"""A small client of containerd's CRI: what a kubelet would ask for, and its streaming exec.

The messages are read out of the containerd binary, which carries the descriptors of its protocol.
"""

from __future__ import annotations

import base64
import functools
import json
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

from tests.harness import daemons

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.descriptor import FileDescriptor

    from tests.harness.engines import Engines

CONTAINERD = Path("/usr/bin/containerd")
PROTO = "api.proto"
SERVICE = "RuntimeService"
GZIP = b"\x1f\x8b\x08"
#: no descriptor is larger
MOST_BYTES = 2_000_000
TIMEOUT = 180.0
STREAMING = Path(__file__).with_name("streaming.py")


def _descriptors(binary: bytes) -> Iterator[descriptor_pb2.FileDescriptorProto]:
    """Every protobuf description that a Go program carries, compressed."""
    start = binary.find(GZIP)
    while start >= 0:
        unpacker = zlib.decompressobj(31)
        try:
            text = unpacker.decompress(binary[start : start + MOST_BYTES])
            if unpacker.eof and text[:1] == b"\x0a":
                yield descriptor_pb2.FileDescriptorProto.FromString(text)
        except Exception:  # what only looks like one
            pass
        start = binary.find(GZIP, start + 1)


def _plain(message: descriptor_pb2.DescriptorProto) -> None:
    """Take out the options: they are of other files that nothing here needs."""
    for field in message.field:
        field.ClearField("options")
    for nested in message.nested_type:
        entry = nested.options.map_entry
        _plain(nested)
        nested.ClearField("options")
        if entry:
            nested.options.map_entry = True
    for enum in message.enum_type:
        enum.ClearField("options")


@functools.cache
def _protocol() -> FileDescriptor:
    fits = [
        each
        for each in _descriptors(CONTAINERD.read_bytes())
        if each.name == PROTO and SERVICE in [service.name for service in each.service]
    ]
    proto = max(fits, key=lambda each: each.package)
    del proto.dependency[:]
    proto.ClearField("options")
    for message in proto.message_type:
        _plain(message)
        message.ClearField("options")
    for enum in proto.enum_type:
        enum.ClearField("options")
        for value in enum.value:
            value.ClearField("options")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(proto)
    return pool.FindFileByName(PROTO)


class Cri:
    """The runtime service: ``cri("ExecSync", container_id=...)`` answers a document."""

    def __init__(self, engines: Engines) -> None:
        self.engines = engines
        self._channel = grpc.insecure_channel(
            f"unix:{engines.inside(daemons.CONTAINERD)}", options=[("grpc.default_authority", "localhost")]
        )

    def close(self) -> None:
        self._channel.close()

    def __call__(self, method: str, **request: Any) -> dict[str, Any]:
        """Ask; raises `grpc.RpcError`."""
        protocol = _protocol()
        service = protocol.services_by_name[SERVICE]
        described = service.methods_by_name[method]
        given = message_factory.GetMessageClass(described.input_type)
        answered = message_factory.GetMessageClass(described.output_type)
        call = self._channel.unary_unary(
            f"/{service.full_name}/{method}",
            request_serializer=given.SerializeToString,
            response_deserializer=answered.FromString,
        )
        answer = call(json_format.ParseDict(request, given()), timeout=TIMEOUT)
        return json_format.MessageToDict(
            answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )

    def execute(self, container_id: str, *cmd: str, timeout: int = 0) -> tuple[int, str, str]:
        """ExecSync: exit code, stdout, stderr."""
        answer = self("ExecSync", container_id=container_id, cmd=[*cmd], timeout=timeout)
        said = [base64.b64decode(answer[name]).decode() for name in ("stdout", "stderr")]
        return answer["exit_code"], said[0], said[1]

    def stream(self, container_id: str, *cmd: str, stdin: bytes = b"", tty: bool = False) -> dict[str, str]:
        """Exec over its stream: what came on the channels 1 (stdout), 2 (stderr) and 3 (the status)."""
        answer = self(
            "Exec", container_id=container_id, cmd=[*cmd], stdin=bool(stdin), stdout=True, stderr=not tty, tty=tty
        )
        said: dict[str, str] = json.loads(self.engines.ok(sys.executable, str(STREAMING), answer["url"], stdin=stdin))
        return said


def pod_config(name: str, logs: Path) -> dict[str, Any]:
    """A pod with a network of its own."""
    return {
        "metadata": {"name": name, "uid": f"uid-{name}", "namespace": "tests", "attempt": 0},
        "hostname": name,
        "log_directory": str(logs),
        "dns_config": {"servers": ["10.0.0.10"], "searches": ["svc.local"]},
        "linux": {
            "cgroup_parent": "/pods-of-tests",
            "security_context": {"namespace_options": {"network": "POD", "pid": "CONTAINER", "ipc": "POD"}},
        },
    }


def container_config(name: str, image: str, *command: str, **linux: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "attempt": 0},
        "image": {"image": image},
        "command": [*command],
        "log_path": f"{name}.log",
        "linux": {"resources": linux, "security_context": {"namespace_options": {"pid": "CONTAINER"}}},
    }
