"""The RPCs: each parses its request, calls one operation and maps what comes back."""

from __future__ import annotations

import threading
import time
from contextlib import closing, suppress
from itertools import chain
from typing import TYPE_CHECKING

from vmsandbox_agent import errors, machine
from vmsandbox_agent.attaching import ProcessService, exit_status
from vmsandbox_agent.events import Event, Exited
from vmsandbox_agent.http2 import StreamOver
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmsandbox_agent.bulk import Bulk
    from vmsandbox_agent.http2 import Stream
    from vmsandbox_agent.naming import NameServer
    from vmsandbox_agent.rpc import Methods
    from vmsandbox_agent.sandbox import Sandbox


class SandboxService:
    """The pod and its machine."""

    def __init__(self, sandbox: Sandbox, machine_: machine.Machine, end: Callable[[bool], None]) -> None:
        """`end` is called when the sandbox was destroyed, with whether to switch off."""
        self._sandbox = sandbox
        self._machine = machine_
        self._end = end

    def CreateSandbox(self, request: pb.CreateSandboxRequest, stream: Stream) -> pb.CreateSandboxResponse:
        self._sandbox.create(request)
        return pb.CreateSandboxResponse(details=self._details(quickly=True))

    def DestroySandbox(self, request: pb.DestroySandboxRequest, stream: Stream) -> pb.DestroySandboxResponse:
        self._sandbox.destroy(request.grace_ms / 1000)
        self._end(request.power_off)
        return pb.DestroySandboxResponse()

    def GetGuestDetails(self, request: pb.GetGuestDetailsRequest, stream: Stream) -> pb.GuestDetails:
        return self._details()

    def SetTime(self, request: pb.SetTimeRequest, stream: Stream) -> pb.SetTimeResponse:
        self._sandbox.set_time(request.time_ns, request.shift_ns)
        return pb.SetTimeResponse(time_ns=time.time_ns())

    def Reseed(self, request: pb.ReseedRequest, stream: Stream) -> pb.ReseedResponse:
        self._sandbox.reseed(request.entropy)
        return pb.ReseedResponse()

    def AddStorages(self, request: pb.AddStoragesRequest, stream: Stream) -> pb.AddStoragesResponse:
        found = self._sandbox.storages.add(request.storages)
        return pb.AddStoragesResponse(
            addresses=[
                pb.StorageAddress(mount_point=point, node=device.node, major=device.major, minor=device.minor)
                for point, device in found.items()
            ]
        )

    def RemoveStorages(self, request: pb.RemoveStoragesRequest, stream: Stream) -> pb.RemoveStoragesResponse:
        self._sandbox.storages.remove(request.mount_points)
        return pb.RemoveStoragesResponse()

    def OnlineCpus(self, request: pb.OnlineCpusRequest, stream: Stream) -> pb.OnlineCpusResponse:
        online, present = self._machine.online_cpus(request.count, request.timeout_ms / 1000)
        return pb.OnlineCpusResponse(online=online, present=present)

    def OnlineMemory(self, request: pb.OnlineMemoryRequest, stream: Stream) -> pb.OnlineMemoryResponse:
        total, available = self._machine.online_memory(
            request.total_kib, request.timeout_ms / 1000, shrink=request.shrink
        )
        return pb.OnlineMemoryResponse(total_kib=total, available_kib=available)

    def ClearMemory(self, request: pb.ClearMemoryRequest, stream: Stream) -> pb.ClearMemoryResponse:
        return pb.ClearMemoryResponse(cleared_kib=self._machine.clear_memory(caches=request.caches))

    def GetMetrics(self, request: pb.GetMetricsRequest, stream: Stream) -> pb.Metrics:
        return pb.Metrics(**self._machine.metrics())

    def CopyIn(self, requests: Iterator[pb.CopyInRequest], stream: Stream) -> pb.CopyInResponse:
        first = next(requests, None)
        if first is None:
            raise errors.InvalidArgumentError("the first message of a copy names its path")
        pieces = (request.data for request in chain([first], requests))
        return pb.CopyInResponse(bytes=self._sandbox.copy_in(first.container_id, first.path, pieces))

    def CopyOut(self, request: pb.CopyOutRequest, stream: Stream) -> Iterator[pb.CopyOutResponse]:
        for data in self._sandbox.copy_out(request.container_id, request.path, follow_link=request.follow_link):
            yield pb.CopyOutResponse(data=data)

    def WriteFiles(self, request: pb.WriteFilesRequest, stream: Stream) -> pb.WriteFilesResponse:
        for name, content in request.files.items():
            self._sandbox.write_etc(name, content)
        return pb.WriteFilesResponse()

    def UpdateInterface(self, request: pb.UpdateInterfaceRequest, stream: Stream) -> pb.Interface:
        return self._sandbox.network.update_interface(request.interface, timeout=request.timeout_ms / 1000)

    def RemoveInterface(self, request: pb.RemoveInterfaceRequest, stream: Stream) -> pb.RemoveInterfaceResponse:
        self._sandbox.network.remove_interface(request.name)
        return pb.RemoveInterfaceResponse()

    def ListInterfaces(self, request: pb.ListInterfacesRequest, stream: Stream) -> pb.ListInterfacesResponse:
        return pb.ListInterfacesResponse(interfaces=self._sandbox.network.interfaces())

    def UpdateRoutes(self, request: pb.UpdateRoutesRequest, stream: Stream) -> pb.ListRoutesResponse:
        return pb.ListRoutesResponse(routes=self._sandbox.network.update_routes(request.routes))

    def ListRoutes(self, request: pb.ListRoutesRequest, stream: Stream) -> pb.ListRoutesResponse:
        return pb.ListRoutesResponse(routes=self._sandbox.network.routes())

    def AddNeighbours(self, request: pb.AddNeighboursRequest, stream: Stream) -> pb.AddNeighboursResponse:
        self._sandbox.network.add_neighbours(request.neighbours)
        return pb.AddNeighboursResponse()

    def AnswerNames(self, requests: Iterator[pb.NameAnswer], stream: Stream) -> Iterator[pb.NameQuestion]:
        from vmsandbox_agent.naming import NameServer  # few pods need it

        first = next(requests, None)
        if first is None or not first.listen:
            raise errors.InvalidArgumentError("the first message says where to listen for names")
        server = NameServer(first.listen)
        if not stream.when_over(server.close):
            server.close()
        threading.Thread(target=_take_answers, args=(requests, server), name="answers", daemon=True).start()
        yield pb.NameQuestion()
        for question in server.questions():
            yield pb.NameQuestion(number=question.number, message=question.message, by_tcp=question.by_tcp)

    def WatchEvents(self, request: pb.WatchEventsRequest, stream: Stream) -> Iterator[pb.Event]:
        watcher = self._sandbox.watch()
        if not stream.when_over(watcher.close):
            watcher.close()
        for event in watcher:
            yield _event(event)

    def _details(self, *, quickly: bool = False) -> pb.GuestDetails:
        details = self._machine.details(identified=self._sandbox.identified, quickly=quickly)
        return pb.GuestDetails(**details)


def _take_answers(requests: Iterator[pb.NameAnswer], server: NameServer) -> None:
    with closing(server), suppress(StreamOver):
        for answer in requests:
            server.answer(answer.number, answer.message)


class ContainerService:
    """Containers."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def CreateContainer(self, request: pb.CreateContainerRequest, stream: Stream) -> pb.CreateContainerResponse:
        container = self._sandbox.create_container(request)
        assert container.init is not None
        return pb.CreateContainerResponse(guest_pid=container.init.child.pid, phases_us=container.phases_us)

    def StartContainer(self, request: pb.StartContainerRequest, stream: Stream) -> pb.StartContainerResponse:
        self._sandbox.container(request.container_id).start()
        return pb.StartContainerResponse()

    def RemoveContainer(self, request: pb.RemoveContainerRequest, stream: Stream) -> pb.RemoveContainerResponse:
        self._sandbox.remove_container(request.container_id, force=request.force)
        return pb.RemoveContainerResponse()

    def UpdateContainer(self, request: pb.UpdateContainerRequest, stream: Stream) -> pb.UpdateContainerResponse:
        self._sandbox.container(request.container_id).update(request.resources_json)
        return pb.UpdateContainerResponse()

    def PauseContainer(self, request: pb.PauseContainerRequest, stream: Stream) -> pb.PauseContainerResponse:
        self._sandbox.container(request.container_id).pause()
        return pb.PauseContainerResponse()

    def ResumeContainer(self, request: pb.ResumeContainerRequest, stream: Stream) -> pb.ResumeContainerResponse:
        self._sandbox.container(request.container_id).resume()
        return pb.ResumeContainerResponse()

    def StatsContainer(self, request: pb.StatsContainerRequest, stream: Stream) -> pb.ContainerStats:
        stats = self._sandbox.container(request.container_id).stats()
        return pb.ContainerStats(**stats._asdict(), time_ns=machine.now_ns())

    def ListProcesses(self, request: pb.ListProcessesRequest, stream: Stream) -> pb.ListProcessesResponse:
        rows = self._sandbox.list_processes(request.container_id)
        return pb.ListProcessesResponse(processes=[pb.ProcessRow(**row._asdict()) for row in rows])

    def ListContainers(self, request: pb.ListContainersRequest, stream: Stream) -> pb.ListContainersResponse:
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
                    state.exit.CopyFrom(exit_status(process.ending))
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


def _event(event: Event) -> pb.Event:
    if isinstance(event, Exited):
        return pb.Event(container_id=event.container_id, exec_id=event.exec_id, exited=exit_status(event.ending))
    return pb.Event(container_id=event.container_id, oom=pb.OomKill(count=event.kills))


def register(
    methods: Methods,
    sandbox: Sandbox,
    machine_: machine.Machine,
    end: Callable[[bool], None],
    bulk: Bulk | None = None,
) -> None:
    """Have everything served."""
    services = pb.DESCRIPTOR.services_by_name
    methods.add(services["Sandbox"], SandboxService(sandbox, machine_, end))
    methods.add(services["Container"], ContainerService(sandbox))
    methods.add(services["Process"], ProcessService(sandbox, bulk))
