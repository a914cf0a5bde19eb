"""The RPCs of processes, and how their streams are attached to."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING

from vmsandbox_agent import errors, stdio
from vmsandbox_agent.bulk import Bulk, Lane
from vmsandbox_agent.http2 import StreamOver
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmsandbox_agent.http2 import Stream
    from vmsandbox_agent.process import Ending
    from vmsandbox_agent.sandbox import Sandbox


class ProcessService:
    """Processes and their streams."""

    def __init__(self, sandbox: Sandbox, bulk: Bulk | None = None) -> None:
        self._sandbox = sandbox
        self._bulk = bulk

    def Exec(self, request: pb.ExecRequest, stream: Stream) -> pb.ExecResponse:
        process = self._sandbox.exec(request)
        return pb.ExecResponse(guest_pid=process.child.pid)

    def Signal(self, request: pb.SignalRequest, stream: Stream) -> pb.SignalResponse:
        container = self._sandbox.container(request.container_id)
        container.signal(request.exec_id, request.signal, everybody=request.all)
        return pb.SignalResponse()

    def Wait(self, request: pb.WaitRequest, stream: Stream) -> pb.ExitStatus:
        return exit_status(self._sandbox.processes.get(request.container_id, request.exec_id).wait())

    def Acknowledge(self, request: pb.AcknowledgeRequest, stream: Stream) -> pb.AcknowledgeResponse:
        self._sandbox.acknowledge(request.container_id, request.exec_id)
        return pb.AcknowledgeResponse()

    def Resize(self, request: pb.ResizeRequest, stream: Stream) -> pb.ResizeResponse:
        self._resize(request)
        return pb.ResizeResponse()

    def Attach(self, requests: Iterator[pb.AttachRequest], stream: Stream) -> Iterator[pb.AttachResponse]:
        first = next(requests, None)
        if first is None or first.WhichOneof("what") != "start":
            raise errors.InvalidArgumentError("the first message of an attachment is its start")
        start = first.start
        table = self._sandbox.processes
        left = threading.Event()

        def gone() -> None:
            left.set()
            table.look_again()

        if not stream.when_over(gone):
            return
        process = table.when_made(start.container_id, start.exec_id, left.is_set)
        lane = self._lane(start)
        session = process.stdio.attach(start.stdout_offset, start.stderr_offset, lane)
        if not stream.when_over(session.leave):
            return
        failures: list[errors.AgentError] = []
        reader = threading.Thread(
            target=self._take_requests, args=(requests, session, failures), name="attach", daemon=True
        )
        reader.start()
        with lane.joined(session) if lane else nullcontext():
            has_bulk = lane is not None
            for happening in session.events():
                if isinstance(happening, stdio.Ended):
                    # Streams are told of the end after it was recorded.
                    assert process.ending is not None
                    yield pb.AttachResponse(exited=exit_status(process.ending))
                else:
                    answer = _attach_response(happening)
                    answer.has_bulk, has_bulk = has_bulk, False
                    yield answer
        if session.failure is not None:
            raise session.failure
        if failures:
            raise failures[0]
        if session.displaced:
            raise errors.UnavailableError("another attachment took over, or the process was removed")

    def _lane(self, start: pb.AttachStart) -> Lane | None:
        """The attachment's share of the port for bulk, if the host offers one and the port is there."""
        if start.bulk_session and self._bulk is not None and self._bulk.open():
            return Lane(self._bulk, start.bulk_session, start.bulk_channel)
        return None

    def _take_requests(
        self, requests: Iterator[pb.AttachRequest], session: stdio.Session, failures: list[errors.AgentError]
    ) -> None:
        try:
            for request in requests:
                what = request.WhichOneof("what")
                if what == "input":
                    session.receive(request.input.offset, request.input.data, eof=request.input.eof)
                elif what == "ack":
                    session.acknowledge(request.ack.stream, request.ack.offset)
                elif what == "resize":
                    self._resize(request.resize)
                elif what == "close":
                    session.abandon(request.close)
                else:
                    raise errors.InvalidArgumentError(f"an attachment does not take '{what}' here")
        except errors.AgentError as error:
            failures.append(error)
            session.leave()
        except StreamOver:
            session.leave()
        else:
            session.finish()

    def _resize(self, request: pb.ResizeRequest) -> None:
        process = self._sandbox.processes.get(request.container_id, request.exec_id)
        process.stdio.resize(request.columns, request.rows)


def _attach_response(happening: stdio.Happening) -> pb.AttachResponse:
    if isinstance(happening, stdio.Data):
        return pb.AttachResponse(
            output=pb.Chunk(
                stream=happening.stream,  # type: ignore[arg-type]
                offset=happening.offset,
                data=happening.data,
                eof=happening.eof,
            )
        )
    if isinstance(happening, stdio.Moved):
        return pb.AttachResponse(moved=pb.Ack(stream=happening.stream, offset=happening.offset))  # type: ignore[arg-type]
    if isinstance(happening, stdio.BulkWanted):
        return pb.AttachResponse(bulk_wanted=True)
    if isinstance(happening, stdio.Accepted):
        return pb.AttachResponse(accepted=pb.Ack(stream=pb.STREAM_STDIN, offset=happening.offset))
    return pb.AttachResponse(stdin_closed=True)


def exit_status(ending: Ending) -> pb.ExitStatus:
    return pb.ExitStatus(
        code=ending.exit.code,
        signal=ending.exit.signal,
        time_ns=ending.exit.time_ns,
        oom_killed=ending.oom_killed,
    )
