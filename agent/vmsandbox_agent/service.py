"""The RPCs: each parses its request, calls one operation and maps what comes back.

An error of ours becomes a gRPC status with its code in the trailing metadata, where the host looks for it; the
status' text is for people.
"""

from __future__ import annotations

import functools
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from vmsandbox_agent import errors, machine, stdio
from vmsandbox_agent.bulk import Bulk, Lane
from vmsandbox_agent.events import Event, Exited
from vmsandbox_protocol import agent_pb2 as pb
from vmsandbox_protocol import agent_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from vmsandbox_agent.process import Ending
    from vmsandbox_agent.sandbox import Sandbox

#: trailing metadata: what the host branches on
CODE_KEY = "vmsandbox-code"
SUBJECT_KEY = "vmsandbox-subject"
STATE_KEY = "vmsandbox-state"
WANTED_KEY = "vmsandbox-wanted"

_STATUS = {
    "not-found": grpc.StatusCode.NOT_FOUND,
    "command-not-found": grpc.StatusCode.NOT_FOUND,
    "already-exists": grpc.StatusCode.ALREADY_EXISTS,
    "invalid-state": grpc.StatusCode.FAILED_PRECONDITION,
    "invalid-argument": grpc.StatusCode.INVALID_ARGUMENT,
    "command-not-executable": grpc.StatusCode.PERMISSION_DENIED,
    "unsupported": grpc.StatusCode.UNIMPLEMENTED,
    "exhausted": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "unavailable": grpc.StatusCode.ABORTED,
    "timed-out": grpc.StatusCode.DEADLINE_EXCEEDED,
}
_MESSAGE_LIMIT = 4096

F = TypeVar("F", bound=Callable[..., Any])


def _abort(context: grpc.ServicerContext, error: Exception) -> None:
    """End the call with the status for an error; does not return."""
    if isinstance(error, errors.AgentError):
        code = error.code
        message = str(error)
    else:
        traceback.print_exc()
        code = "internal"
        message = f"{type(error).__name__}: {error}"
    metadata = [(CODE_KEY, code)]
    if isinstance(error, errors.InvalidStateError):
        metadata += [(SUBJECT_KEY, error.subject), (STATE_KEY, error.state), (WANTED_KEY, error.wanted)]
    context.set_trailing_metadata([(key, _printable(value)) for key, value in metadata])
    context.abort(_STATUS.get(code, grpc.StatusCode.INTERNAL), _printable(message))


def _printable(text: str) -> str:
    return text[:_MESSAGE_LIMIT].encode("ascii", "replace").decode()


def _rpc(method: F) -> F:
    """An RPC with one answer."""

    @functools.wraps(method)
    def wrapped(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(self, request, context)
        except Exception as error:
            _abort(context, error)

    return wrapped  # type: ignore[return-value]


def _streaming(method: F) -> F:
    """An RPC that answers with a stream."""

    @functools.wraps(method)
    def wrapped(self: Any, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from method(self, request, context)
        except Exception as error:
            _abort(context, error)

    return wrapped  # type: ignore[return-value]


class SandboxService(pb_grpc.SandboxServicer):
    """The pod and its machine."""

    def __init__(self, sandbox: Sandbox, machine_: machine.Machine, end: Callable[[bool], None]) -> None:
        """`end` is called when the sandbox was destroyed, with whether to switch off."""
        self._sandbox = sandbox
        self._machine = machine_
        self._end = end

    @_rpc
    def CreateSandbox(
        self, request: pb.CreateSandboxRequest, context: grpc.ServicerContext
    ) -> pb.CreateSandboxResponse:
        self._sandbox.create(request)
        return pb.CreateSandboxResponse(details=self._details(quickly=True))

    @_rpc
    def DestroySandbox(
        self, request: pb.DestroySandboxRequest, context: grpc.ServicerContext
    ) -> pb.DestroySandboxResponse:
        self._sandbox.destroy(request.grace_ms / 1000)
        self._end(request.power_off)
        return pb.DestroySandboxResponse()

    @_rpc
    def GetGuestDetails(self, request: pb.GetGuestDetailsRequest, context: grpc.ServicerContext) -> pb.GuestDetails:
        return self._details()

    @_rpc
    def SetTime(self, request: pb.SetTimeRequest, context: grpc.ServicerContext) -> pb.SetTimeResponse:
        self._sandbox.set_time(request.time_ns, request.shift_ns)
        return pb.SetTimeResponse(time_ns=time.time_ns())

    @_rpc
    def Reseed(self, request: pb.ReseedRequest, context: grpc.ServicerContext) -> pb.ReseedResponse:
        self._sandbox.reseed(request.entropy)
        return pb.ReseedResponse()

    @_rpc
    def AddStorages(self, request: pb.AddStoragesRequest, context: grpc.ServicerContext) -> pb.AddStoragesResponse:
        found = self._sandbox.storages.add(request.storages)
        return pb.AddStoragesResponse(
            addresses=[
                pb.StorageAddress(mount_point=point, node=device.node, major=device.major, minor=device.minor)
                for point, device in found.items()
            ]
        )

    @_rpc
    def RemoveStorages(
        self, request: pb.RemoveStoragesRequest, context: grpc.ServicerContext
    ) -> pb.RemoveStoragesResponse:
        self._sandbox.storages.remove(request.mount_points)
        return pb.RemoveStoragesResponse()

    @_rpc
    def OnlineCpus(self, request: pb.OnlineCpusRequest, context: grpc.ServicerContext) -> pb.OnlineCpusResponse:
        online, present = self._machine.online_cpus(request.count, request.timeout_ms / 1000)
        return pb.OnlineCpusResponse(online=online, present=present)

    @_rpc
    def OnlineMemory(self, request: pb.OnlineMemoryRequest, context: grpc.ServicerContext) -> pb.OnlineMemoryResponse:
        total, available = self._machine.online_memory(
            request.total_kib, request.timeout_ms / 1000, shrink=request.shrink
        )
        return pb.OnlineMemoryResponse(total_kib=total, available_kib=available)

    @_rpc
    def ClearMemory(self, request: pb.ClearMemoryRequest, context: grpc.ServicerContext) -> pb.ClearMemoryResponse:
        return pb.ClearMemoryResponse(cleared_kib=self._machine.clear_memory(caches=request.caches))

    @_rpc
    def GetMetrics(self, request: pb.GetMetricsRequest, context: grpc.ServicerContext) -> pb.Metrics:
        return pb.Metrics(**self._machine.metrics())

    @_rpc
    def CopyIn(self, requests: Iterator[pb.CopyInRequest], context: grpc.ServicerContext) -> pb.CopyInResponse:
        first = next(requests, None)
        if first is None:
            raise errors.InvalidArgumentError("the first message of a copy names its path")
        pieces = (request.data for request in chain([first], requests))
        return pb.CopyInResponse(bytes=self._sandbox.copy_in(first.container_id, first.path, pieces))

    @_streaming
    def CopyOut(self, request: pb.CopyOutRequest, context: grpc.ServicerContext) -> Iterator[pb.CopyOutResponse]:
        for data in self._sandbox.copy_out(request.container_id, request.path, follow_link=request.follow_link):
            yield pb.CopyOutResponse(data=data)

    @_rpc
    def WriteFiles(self, request: pb.WriteFilesRequest, context: grpc.ServicerContext) -> pb.WriteFilesResponse:
        for name, content in request.files.items():
            self._sandbox.write_etc(name, content)
        return pb.WriteFilesResponse()

    @_rpc
    def UpdateInterface(self, request: pb.UpdateInterfaceRequest, context: grpc.ServicerContext) -> pb.Interface:
        return self._sandbox.network.update_interface(request.interface, timeout=request.timeout_ms / 1000)

    @_rpc
    def RemoveInterface(
        self, request: pb.RemoveInterfaceRequest, context: grpc.ServicerContext
    ) -> pb.RemoveInterfaceResponse:
        self._sandbox.network.remove_interface(request.name)
        return pb.RemoveInterfaceResponse()

    @_rpc
    def ListInterfaces(
        self, request: pb.ListInterfacesRequest, context: grpc.ServicerContext
    ) -> pb.ListInterfacesResponse:
        return pb.ListInterfacesResponse(interfaces=self._sandbox.network.interfaces())

    @_rpc
    def UpdateRoutes(self, request: pb.UpdateRoutesRequest, context: grpc.ServicerContext) -> pb.ListRoutesResponse:
        return pb.ListRoutesResponse(routes=self._sandbox.network.update_routes(request.routes))

    @_rpc
    def ListRoutes(self, request: pb.ListRoutesRequest, context: grpc.ServicerContext) -> pb.ListRoutesResponse:
        return pb.ListRoutesResponse(routes=self._sandbox.network.routes())

    @_rpc
    def AddNeighbours(
        self, request: pb.AddNeighboursRequest, context: grpc.ServicerContext
    ) -> pb.AddNeighboursResponse:
        self._sandbox.network.add_neighbours(request.neighbours)
        return pb.AddNeighboursResponse()

    @_streaming
    def WatchEvents(self, request: pb.WatchEventsRequest, context: grpc.ServicerContext) -> Iterator[pb.Event]:
        watcher = self._sandbox.watch()
        if not context.add_callback(watcher.close):
            watcher.close()
        for event in watcher:
            yield _event(event)

    def _details(self, *, quickly: bool = False) -> pb.GuestDetails:
        details = self._machine.details(identified=self._sandbox.identified, quickly=quickly)
        return pb.GuestDetails(**details)


class ContainerService(pb_grpc.ContainerServicer):
    """Containers."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    @_rpc
    def CreateContainer(
        self, request: pb.CreateContainerRequest, context: grpc.ServicerContext
    ) -> pb.CreateContainerResponse:
        container = self._sandbox.create_container(request)
        assert container.init is not None
        return pb.CreateContainerResponse(guest_pid=container.init.child.pid, phases_us=container.phases_us)

    @_rpc
    def StartContainer(
        self, request: pb.StartContainerRequest, context: grpc.ServicerContext
    ) -> pb.StartContainerResponse:
        self._sandbox.container(request.container_id).start()
        return pb.StartContainerResponse()

    @_rpc
    def RemoveContainer(
        self, request: pb.RemoveContainerRequest, context: grpc.ServicerContext
    ) -> pb.RemoveContainerResponse:
        self._sandbox.remove_container(request.container_id, force=request.force)
        return pb.RemoveContainerResponse()

    @_rpc
    def UpdateContainer(
        self, request: pb.UpdateContainerRequest, context: grpc.ServicerContext
    ) -> pb.UpdateContainerResponse:
        self._sandbox.container(request.container_id).update(request.resources_json)
        return pb.UpdateContainerResponse()

    @_rpc
    def PauseContainer(
        self, request: pb.PauseContainerRequest, context: grpc.ServicerContext
    ) -> pb.PauseContainerResponse:
        self._sandbox.container(request.container_id).pause()
        return pb.PauseContainerResponse()

    @_rpc
    def ResumeContainer(
        self, request: pb.ResumeContainerRequest, context: grpc.ServicerContext
    ) -> pb.ResumeContainerResponse:
        self._sandbox.container(request.container_id).resume()
        return pb.ResumeContainerResponse()

    @_rpc
    def StatsContainer(self, request: pb.StatsContainerRequest, context: grpc.ServicerContext) -> pb.ContainerStats:
        stats = self._sandbox.container(request.container_id).stats()
        return pb.ContainerStats(**vars(stats), time_ns=machine.now_ns())

    @_rpc
    def ListProcesses(
        self, request: pb.ListProcessesRequest, context: grpc.ServicerContext
    ) -> pb.ListProcessesResponse:
        rows = self._sandbox.list_processes(request.container_id)
        return pb.ListProcessesResponse(processes=[pb.ProcessRow(**vars(row)) for row in rows])

    @_rpc
    def ListContainers(
        self, request: pb.ListContainersRequest, context: grpc.ServicerContext
    ) -> pb.ListContainersResponse:
        rows = []
        for container in self._sandbox.containers():
            states = []
            for process in self._sandbox.processes.of(container.id):
                stdout, stderr, stdin = process.stdio.offsets()
                state = pb.ProcessState(
                    exec_id=process.key[1],
                    started=process.started,
                    stdout_offset=stdout,
                    stderr_offset=stderr,
                    stdin_offset=stdin,
                )
                if process.ending is not None:
                    state.exit.CopyFrom(_exit_status(process.ending))
                states.append(state)
            rows.append(
                pb.ContainerRow(
                    container_id=container.id,
                    status=container.status,
                    processes=states,
                    oom_kills=container.oom_kills(),
                )
            )
        return pb.ListContainersResponse(containers=rows)


class ProcessService(pb_grpc.ProcessServicer):
    """Processes and their streams."""

    def __init__(self, sandbox: Sandbox, bulk: Bulk | None = None) -> None:
        self._sandbox = sandbox
        self._bulk = bulk

    @_rpc
    def Exec(self, request: pb.ExecRequest, context: grpc.ServicerContext) -> pb.ExecResponse:
        process = self._sandbox.exec(request)
        return pb.ExecResponse(guest_pid=process.child.pid)

    @_rpc
    def Signal(self, request: pb.SignalRequest, context: grpc.ServicerContext) -> pb.SignalResponse:
        container = self._sandbox.container(request.container_id)
        container.signal(request.exec_id, request.signal, everybody=request.all)
        return pb.SignalResponse()

    @_rpc
    def Wait(self, request: pb.WaitRequest, context: grpc.ServicerContext) -> pb.ExitStatus:
        return _exit_status(self._sandbox.processes.get(request.container_id, request.exec_id).wait())

    @_rpc
    def Acknowledge(self, request: pb.AcknowledgeRequest, context: grpc.ServicerContext) -> pb.AcknowledgeResponse:
        self._sandbox.acknowledge(request.container_id, request.exec_id)
        return pb.AcknowledgeResponse()

    @_rpc
    def Resize(self, request: pb.ResizeRequest, context: grpc.ServicerContext) -> pb.ResizeResponse:
        self._resize(request)
        return pb.ResizeResponse()

    @_streaming
    def Attach(
        self, requests: Iterator[pb.AttachRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.AttachResponse]:
        first = next(requests, None)
        if first is None or first.WhichOneof("what") != "start":
            raise errors.InvalidArgumentError("the first message of an attachment is its start")
        start = first.start
        table = self._sandbox.processes
        left = threading.Event()

        def gone() -> None:
            left.set()
            table.look_again()

        if not context.add_callback(gone):
            return
        process = table.when_made(start.container_id, start.exec_id, left.is_set)
        lane = self._lane(start)
        session = process.stdio.attach(start.stdout_offset, start.stderr_offset, lane)
        if not context.add_callback(session.leave):
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
                    yield pb.AttachResponse(exited=_exit_status(process.ending))
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
        except Exception:  # gRPC raises a bare one when the call is over
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


def _exit_status(ending: Ending) -> pb.ExitStatus:
    return pb.ExitStatus(
        code=ending.exit.code,
        signal=ending.exit.signal,
        time_ns=ending.exit.time_ns,
        oom_killed=ending.oom_killed,
    )


def _event(event: Event) -> pb.Event:
    if isinstance(event, Exited):
        return pb.Event(container_id=event.container_id, exec_id=event.exec_id, exited=_exit_status(event.ending))
    return pb.Event(container_id=event.container_id, oom=pb.OomKill(count=event.count))


def register(
    server: grpc.Server,
    sandbox: Sandbox,
    machine_: machine.Machine,
    end: Callable[[bool], None],
    bulk: Bulk | None = None,
) -> None:
    """Serve everything on `server`."""
    pb_grpc.add_SandboxServicer_to_server(SandboxService(sandbox, machine_, end), server)  # type: ignore[no-untyped-call]
    pb_grpc.add_ContainerServicer_to_server(ContainerService(sandbox), server)  # type: ignore[no-untyped-call]
    pb_grpc.add_ProcessServicer_to_server(ProcessService(sandbox, bulk), server)  # type: ignore[no-untyped-call]
