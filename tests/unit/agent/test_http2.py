"""The agent's server speaks to gRPC's own client: messages, bounds, ends and failures."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from h2.connection import H2Connection

from tests.harness.cli import awaited
from vmsandbox_agent import errors
from vmsandbox_agent.http2 import MESSAGE_LIMIT, MOST_STREAMS, Connection, Stream
from vmsandbox_agent.rpc import Methods
from vmsandbox_agent.server import ServedSocket
from vmsandbox_protocol import agent_pb2 as pb
from vmsandbox_protocol import agent_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATIENCE = 30
MIB = 1024 * 1024


class Sandbox:
    """Answers what a test wants; what it has no method for is answered with nothing."""

    def __init__(self) -> None:
        self.going_on = threading.Event()
        self.left = threading.Event()
        self.closed = threading.Event()
        self.taken = 0
        self.given = 0
        self.running = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda request, stream: pb.SetTimeResponse()

    def WriteFiles(self, request: pb.WriteFilesRequest, stream: Stream) -> pb.WriteFilesResponse:
        raise {
            "state": errors.InvalidStateError("container 'ä'", state="stopped", wanted="start"),
            "percent": errors.NotFoundError("100 % of 'é' are missing"),
            "long": errors.UnavailableError("x" * 100_000),
            "bug": RuntimeError("never thought of"),
        }[next(iter(request.files))]

    def CopyIn(self, requests: Iterator[pb.CopyInRequest], stream: Stream) -> pb.CopyInResponse:
        self.going_on.wait(PATIENCE)
        for request in requests:
            self.taken += len(request.data)
            if request.path == "enough":
                raise errors.ExhaustedError("the disk is full")
        return pb.CopyInResponse(bytes=self.taken)

    def CopyOut(self, request: pb.CopyOutRequest, stream: Stream) -> Iterator[pb.CopyOutResponse]:
        assert stream.when_over(self.left.set)
        try:
            for _ in range(int(request.path)):
                yield pb.CopyOutResponse(data=bytes(MIB))
                self.given += MIB
        finally:
            self.closed.set()

    def GetMetrics(self, request: pb.GetMetricsRequest, stream: Stream) -> pb.Metrics:
        self.running += 1
        self.going_on.wait(PATIENCE)
        return pb.Metrics()


@pytest.fixture
def sandbox() -> Sandbox:
    return Sandbox()


@pytest.fixture
def served(sandbox: Sandbox, tmp_path: Path) -> Iterator[str]:
    methods = Methods()
    methods.add(pb.DESCRIPTOR.services_by_name["Sandbox"], sandbox)
    endpoint = ServedSocket.at_path(tmp_path / "socket", methods.connection)
    endpoint.start()
    yield f"unix:{tmp_path / 'socket'}"
    sandbox.going_on.set()
    endpoint.drain(PATIENCE)


@pytest.fixture
def stub(served: str) -> Iterator[agent_pb2_grpc.SandboxStub]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with closing(grpc.insecure_channel(served, options=options)) as channel:
        yield agent_pb2_grpc.SandboxStub(channel)  # type: ignore[no-untyped-call]


def exchange_much(stub: Any) -> None:
    """Ask and be answered over the same connection, so often that whatever can be sent beside it has been."""
    for _ in range(100):
        stub.SetTime(pb.SetTimeRequest(), timeout=PATIENCE)


def test_one_connection_serves_many_calls_one_after_the_other(stub: Any) -> None:
    for _ in range(300):
        assert stub.SetTime(pb.SetTimeRequest(), timeout=PATIENCE) == pb.SetTimeResponse()


def test_calls_do_not_wait_for_each_other(stub: Any, sandbox: Sandbox) -> None:
    with ThreadPoolExecutor(60) as pool:
        waiting = [pool.submit(stub.GetMetrics, pb.GetMetricsRequest(), timeout=PATIENCE) for _ in range(50)]
        awaited(lambda: sandbox.running == 50)
        stub.SetTime(pb.SetTimeRequest(), timeout=PATIENCE)
        sandbox.going_on.set()
        assert [each.result() for each in waiting] == [pb.Metrics()] * 50


def test_more_calls_than_it_serves_at_once_wait_their_turn(stub: Any, sandbox: Sandbox) -> None:
    calls = [stub.GetMetrics.future(pb.GetMetricsRequest(), timeout=PATIENCE) for _ in range(MOST_STREAMS + 20)]
    awaited(lambda: sandbox.running == MOST_STREAMS)
    sandbox.going_on.set()
    assert all(call.result() == pb.Metrics() for call in calls)


def test_a_message_larger_than_the_window_gets_in(stub: Any, sandbox: Sandbox) -> None:
    sandbox.going_on.set()
    assert stub.CopyIn(iter([pb.CopyInRequest(data=bytes(10 * MIB))]), timeout=PATIENCE).bytes == 10 * MIB


def test_a_message_that_is_too_large_is_refused_before_it_is_kept(stub: Any, sandbox: Sandbox) -> None:
    sandbox.going_on.set()
    with pytest.raises(grpc.RpcError) as caught:
        stub.CopyIn(iter([pb.CopyInRequest(data=bytes(MESSAGE_LIMIT))]), timeout=PATIENCE)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_sender_waits_for_who_does_not_take(stub: Any, sandbox: Sandbox) -> None:
    sent = 0

    def pieces() -> Iterator[pb.CopyInRequest]:
        nonlocal sent
        for _ in range(640):
            yield pb.CopyInRequest(data=bytes(64 * 1024))
            sent += 1

    call = stub.CopyIn.future(pieces(), timeout=PATIENCE)
    awaited(lambda: sent > 10)
    exchange_much(stub)
    assert sent < 100
    sandbox.going_on.set()
    assert call.result().bytes == 40 * MIB


def test_much_is_given_and_not_faster_than_it_is_taken(stub: Any, sandbox: Sandbox) -> None:
    answers = stub.CopyOut(pb.CopyOutRequest(path="60"), timeout=PATIENCE)
    next(answers)
    exchange_much(stub)
    assert sandbox.given < 30 * MIB
    assert 1 + sum(1 for _ in answers) == 60
    assert sandbox.closed.is_set()


def test_who_loses_interest_is_noticed_and_what_was_to_be_given_is_closed(stub: Any, sandbox: Sandbox) -> None:
    answers = stub.CopyOut(pb.CopyOutRequest(path="100000"), timeout=PATIENCE)
    next(answers)
    answers.cancel()
    assert sandbox.left.wait(PATIENCE)
    assert sandbox.closed.wait(PATIENCE)
    stub.SetTime(pb.SetTimeRequest(), timeout=PATIENCE)


def test_a_host_that_disappears_ends_its_streams(served: str, sandbox: Sandbox) -> None:
    with closing(grpc.insecure_channel(served)) as channel:
        next(agent_pb2_grpc.SandboxStub(channel).CopyOut(pb.CopyOutRequest(path="100000")))  # type: ignore[no-untyped-call]
    assert sandbox.left.wait(PATIENCE)
    assert sandbox.closed.wait(PATIENCE)


def test_a_refusal_reaches_who_is_still_sending(stub: Any, sandbox: Sandbox) -> None:
    sandbox.going_on.set()

    def pieces() -> Iterator[pb.CopyInRequest]:
        while True:
            yield pb.CopyInRequest(path="enough", data=bytes(64 * 1024))

    for _ in range(20):
        with pytest.raises(grpc.RpcError) as caught:
            stub.CopyIn(pieces(), timeout=PATIENCE)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.details() == "the disk is full"
    stub.SetTime(pb.SetTimeRequest(), timeout=PATIENCE)


@pytest.mark.parametrize(
    ("what", "code", "details", "metadata"),
    [
        (
            "state",
            grpc.StatusCode.FAILED_PRECONDITION,
            "cannot start container '?': it is stopped",
            {
                "vmsandbox-code": "invalid-state",
                "vmsandbox-subject": "container '?'",
                "vmsandbox-state": "stopped",
                "vmsandbox-wanted": "start",
            },
        ),
        ("percent", grpc.StatusCode.NOT_FOUND, "100 % of '?' are missing", {"vmsandbox-code": "not-found"}),
        ("long", grpc.StatusCode.ABORTED, "x" * 4096, {"vmsandbox-code": "unavailable"}),
        ("bug", grpc.StatusCode.INTERNAL, "RuntimeError: never thought of", {"vmsandbox-code": "internal"}),
    ],
)
def test_an_error_is_a_status_with_a_code(
    stub: Any, what: str, code: grpc.StatusCode, details: str, metadata: dict[str, str]
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.WriteFiles(pb.WriteFilesRequest(files={what: b""}), timeout=PATIENCE)
    assert caught.value.code() == code
    assert caught.value.details() == details
    assert dict(caught.value.trailing_metadata()) == metadata


def test_what_is_not_served_is_said(served: str) -> None:
    with closing(grpc.insecure_channel(served)) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/vmsandbox.agent/Nothing")(b"", timeout=PATIENCE)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_request_that_is_no_message_is_refused(served: str) -> None:
    service = pb.DESCRIPTOR.services_by_name["Sandbox"].full_name
    with closing(grpc.insecure_channel(served)) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{service}/SetTime")(b"\xff\xff\xff", timeout=PATIENCE)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_compressed_message_is_refused(served: str) -> None:
    with closing(grpc.insecure_channel(served, compression=grpc.Compression.Gzip)) as channel:
        stub = agent_pb2_grpc.SandboxStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError) as caught:
            stub.Reseed(pb.ReseedRequest(entropy=bytes(10_000)), timeout=PATIENCE)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_service_lacks_no_method() -> None:
    with pytest.raises(AttributeError, match="CreateSandbox"):
        Methods().add(pb.DESCRIPTOR.services_by_name["Sandbox"], object())


def test_what_is_no_http_ends_the_connection_and_says_so() -> None:
    connection = Connection(lambda stream, headers: None)
    assert not connection.receive(b"GET / HTTP/1.1\r\nHost: nowhere.example\r\n\r\n")
    assert not connection.receive(b"anything")
    assert connection.take(MIB)
    assert connection.take(MIB) == b""


def test_a_call_behind_the_end_of_a_connection_does_not_begin() -> None:
    begun: list[Stream] = []
    connection = Connection(lambda stream, headers: begun.append(stream))
    host, another = H2Connection(), H2Connection()
    host.initiate_connection()
    another.initiate_connection()
    another.clear_outbound_data_buffer()
    host.close_connection()
    another.send_headers(1, [(":method", "POST"), (":path", "/"), (":scheme", "http"), (":authority", "")])
    assert not connection.receive(host.data_to_send() + another.data_to_send())
    assert begun == []
