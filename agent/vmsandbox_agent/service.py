"""The RPCs: each parses its request, calls one operation and maps what comes back."""

from __future__ import annotations

import time
from itertools import chain
from typing import TYPE_CHECKING

from vmsandbox_agent import errors, machine
from vmsandbox_agent.attaching import ProcessService, exit_status
from vmsandbox_agent.events import Event, Exited
from vmsandbox_agent.rpc import rpc, streaming
from vmsandbox_protocol import agent_pb2 as pb
from vmsandbox_protocol import agent_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import grpc

    from vmsandbox_agent.bulk import Bulk
    from vmsandbox_agent.sandbox import Sandbox


class SandboxService(pb_grpc.SandboxServicer):
    """The pod and its machine."""

    def __init__(self, sandbox: Sandbox, machine_: machine.Machine, end: Callable[[bool], None]) -> None:
        """`end` is called when the sandbox was destroyed, with whether to switch off."""
        self._sandbox = sandbox
        self._machine = machine_
        self._end = end

    @rpc
    def CreateSandbox(
        self, request: pb.CreateSandboxRequest, context: grpc.ServicerContext
    ) -> pb.CreateSandboxResponse:
        self._sandbox.create(request)
        return pb.CreateSandboxResponse(details=self._details(quickly=True))

    @rpc
    def DestroySandbox(
        self, request: pb.DestroySandboxRequest, context: grpc.ServicerContext
    ) -> pb.DestroySandboxResponse:
        self._sandbox.destroy(request.grace_ms / 1000)
        self._end(request.power_off)
        return pb.DestroySandboxResponse()

    @rpc
    def GetGuestDetails(self, request: pb.GetGuestDetailsRequest, context: grpc.ServicerContext) -> pb.GuestDetails:
        return self._details()

    @rpc
    def SetTime(self, request: pb.SetTimeRequest, context: grpc.ServicerContext) -> pb.SetTimeResponse:
        self._sandbox.set_time(request.time_ns, request.shift_ns)
        return pb.SetTimeResponse(time_ns=time.time_ns())

    @rpc
    def Reseed(self, request: pb.ReseedRequest, context: grpc.ServicerContext) -> pb.ReseedResponse:
        self._sandbox.reseed(request.entropy)
        return pb.ReseedResponse()

    @rpc
    def AddStorages(self, request: pb.AddStoragesRequest, context: grpc.ServicerContext) -> pb.AddStoragesResponse:
        found = self._sandbox.storages.add(request.storages)
        return pb.AddStoragesResponse(
            addresses=[
                pb.StorageAddress(mount_point=point, node=device.node, major=device.major, minor=device.minor)
                for point, device in found.items()
            ]
        )

    @rpc
    def RemoveStorages(
        self, request: pb.RemoveStoragesRequest, context: grpc.ServicerContext
    ) -> pb.RemoveStoragesResponse:
        self._sandbox.storages.remove(request.mount_points)
        return pb.RemoveStoragesResponse()

    @rpc
    def OnlineCpus(self, request: pb.OnlineCpusRequest, context: grpc.ServicerContext) -> pb.OnlineCpusResponse:
        online, present = self._machine.online_cpus(request.count, request.timeout_ms / 1000)
        return pb.OnlineCpusResponse(online=online, present=present)

    @rpc
    def OnlineMemory(self, request: pb.OnlineMemoryRequest, context: grpc.ServicerContext) -> pb.OnlineMemoryResponse:
        total, available = self._machine.online_memory(
            request.total_kib, request.timeout_ms / 1000, shrink=request.shrink
        )
        return pb.OnlineMemoryResponse(total_kib=total, available_kib=available)

    @rpc
    def ClearMemory(self, request: pb.ClearMemoryRequest, context: grpc.ServicerContext) -> pb.ClearMemoryResponse:
        return pb.ClearMemoryResponse(cleared_kib=self._machine.clear_memory(caches=request.caches))

    @rpc
    def GetMetrics(self, request: pb.GetMetricsRequest, context: grpc.ServicerContext) -> pb.Metrics:
        return pb.Metrics(**self._machine.metrics())

    @rpc
    def CopyIn(self, requests: Iterator[pb.CopyInRequest], context: grpc.ServicerContext) -> pb.CopyInResponse:
        first = next(requests, None)
        if first is None:
            raise errors.InvalidArgumentError("the first message of a copy names its path")
        pieces = (request.data for request in chain([first], requests))
        return pb.CopyInResponse(bytes=self._sandbox.copy_in(first.container_id, first.path, pieces))

    @streaming
    def CopyOut(self, request: pb.CopyOutRequest, context: grpc.ServicerContext) -> Iterator[pb.CopyOutResponse]:
        for data in self._sandbox.copy_out(request.container_id, request.path, follow_link=request.follow_link):
            yield pb.CopyOutResponse(data=data)

    @rpc
    def WriteFiles(self, request: pb.WriteFilesRequest, context: grpc.ServicerContext) -> pb.WriteFilesResponse:
        for name, content in request.files.items():
            self._sandbox.write_etc(name, content)
        return pb.WriteFilesResponse()

    @rpc
    def UpdateInterface(self, request: pb.UpdateInterfaceRequest, context: grpc.ServicerContext) -> pb.Interface:
        return self._sandbox.network.update_interface(request.interface, timeout=request.timeout_ms / 1000)

    @rpc
    def RemoveInterface(
        self, request: pb.RemoveInterfaceRequest, context: grpc.ServicerContext
    ) -> pb.RemoveInterfaceResponse:
        self._sandbox.network.remove_interface(request.name)
        return pb.RemoveInterfaceResponse()

    @rpc
    def ListInterfaces(
        self, request: pb.ListInterfacesRequest, context: grpc.ServicerContext
    ) -> pb.ListInterfacesResponse:
        return pb.ListInterfacesResponse(interfaces=self._sandbox.network.interfaces())

    @rpc
    def UpdateRoutes(self, request: pb.UpdateRoutesRequest, context: grpc.ServicerContext) -> pb.ListRoutesResponse:
        return pb.ListRoutesResponse(routes=self._sandbox.network.update_routes(request.routes))

    @rpc
    def ListRoutes(self, request: pb.ListRoutesRequest, context: grpc.ServicerContext) -> pb.ListRoutesResponse:
        return pb.ListRoutesResponse(routes=self._sandbox.network.routes())

    @rpc
    def AddNeighbours(
        self, request: pb.AddNeighboursRequest, context: grpc.ServicerContext
    ) -> pb.AddNeighboursResponse:
        self._sandbox.network.add_neighbours(request.neighbours)
        return pb.AddNeighboursResponse()

    @streaming
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

    @rpc
    def CreateContainer(
        self, request: pb.CreateContainerRequest, context: grpc.ServicerContext
    ) -> pb.CreateContainerResponse:
        container = self._sandbox.create_container(request)
        assert container.init is not None
        return pb.CreateContainerResponse(guest_pid=container.init.child.pid, phases_us=container.phases_us)

    @rpc
    def StartContainer(
        self, request: pb.StartContainerRequest, context: grpc.ServicerContext
    ) -> pb.StartContainerResponse:
        self._sandbox.container(request.container_id).start()
        return pb.StartContainerResponse()

    @rpc
    def RemoveContainer(
        self, request: pb.RemoveContainerRequest, context: grpc.ServicerContext
    ) -> pb.RemoveContainerResponse:
        self._sandbox.remove_container(request.container_id, force=request.force)
        return pb.RemoveContainerResponse()

    @rpc
    def UpdateContainer(
        self, request: pb.UpdateContainerRequest, context: grpc.ServicerContext
    ) -> pb.UpdateContainerResponse:
        self._sandbox.container(request.container_id).update(request.resources_json)
        return pb.UpdateContainerResponse()

    @rpc
    def PauseContainer(
        self, request: pb.PauseContainerRequest, context: grpc.ServicerContext
    ) -> pb.PauseContainerResponse:
        self._sandbox.container(request.container_id).pause()
        return pb.PauseContainerResponse()

    @rpc
    def ResumeContainer(
        self, request: pb.ResumeContainerRequest, context: grpc.ServicerContext
    ) -> pb.ResumeContainerResponse:
        self._sandbox.container(request.container_id).resume()
        return pb.ResumeContainerResponse()

    @rpc
    def StatsContainer(self, request: pb.StatsContainerRequest, context: grpc.ServicerContext) -> pb.ContainerStats:
        stats = self._sandbox.container(request.container_id).stats()
        return pb.ContainerStats(**vars(stats), time_ns=machine.now_ns())

    @rpc
    def ListProcesses(
        self, request: pb.ListProcessesRequest, context: grpc.ServicerContext
    ) -> pb.ListProcessesResponse:
        rows = self._sandbox.list_processes(request.container_id)
        return pb.ListProcessesResponse(processes=[pb.ProcessRow(**vars(row)) for row in rows])

    @rpc
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
