"""The agent's RPCs as typed methods, and what keeps the host safe from it.

The agent may be hostile: its messages are limited in size, every answer is checked, and its texts are cut and freed
of control characters before anybody shows them.  Errors become the classes of `vmsandbox.errors`: by the code in the
trailing metadata, or by the gRPC status where the agent did not answer at all.

gRPC takes long to import, so it is imported when a client is made, and importing this module costs nothing.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import SandboxError, TimedOutError, UnavailableError
from vmsandbox.guest import transport
from vmsandbox.guest.attachment import Attachment
from vmsandbox.guest.bulk import BulkPort
from vmsandbox.guest.naming import Names
from vmsandbox.guest.replies import (
    broken,
    check_bounds,
    check_exit,
    check_phases,
    check_process,
    moment,
    protocol,
    translating,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
    from pathlib import Path

    from vmsandbox_protocol import agent_pb2 as pb

#: bytes of an archive in one message
_ARCHIVE_CHUNK = 256 * 1024
#: What is parsed may take twenty times as much memory as it has bytes.
_MESSAGE_LIMIT = 4 * 1024 * 1024
_REQUEST_LIMIT = 64 * 1024 * 1024
#: as a set of bits of gRPC's: only what is not compressed, since the limit is not that of what it unpacks to
_UNCOMPRESSED = 1
#: processors of the largest machine there is
_MOST_CPUS = 4096
#: init processes and execs; those that are new to the host get a line in a document
_MOST_PROCESSES = 16384
#: seconds for a call that should be quick
QUICK = 30.0


class AgentClient:
    """What the supervisor calls.  Every method raises a `SandboxError`."""

    def __init__(self, relay: transport.Relay, channel: Any, bulk: BulkPort | None = None) -> None:
        from vmsandbox_protocol import agent_pb2_grpc

        self._relay = relay
        self._channel = channel
        self._bulk = bulk
        self._sandbox: Any = agent_pb2_grpc.SandboxStub(channel)  # type: ignore[no-untyped-call]
        self._container: Any = agent_pb2_grpc.ContainerStub(channel)  # type: ignore[no-untyped-call]
        self._process: Any = agent_pb2_grpc.ProcessStub(channel)  # type: ignore[no-untyped-call]

    @classmethod
    @asynccontextmanager
    async def connected(
        cls, port_path: Path, *, directory: Path, bulk_path: Path | None = None
    ) -> AsyncIterator[AgentClient]:
        """Reach the agent behind the VMM's socket for its port; returns at once, calls wait for the agent.

        `directory` is private and gets a socket.  `bulk_path` is the VMM's socket for the port for bulk stdio.
        """
        dial = transport.through_port(port_path)
        async with cls.dialled(dial, directory=directory, bulk_path=bulk_path) as client:
            yield client

    @staticmethod
    def load() -> None:
        """Load what a connection needs, which takes a while."""
        import grpc.aio  # noqa: F401

    @classmethod
    @asynccontextmanager
    async def dialled(
        cls, dial: transport.Dial, *, directory: Path, bulk_path: Path | None = None
    ) -> AsyncIterator[AgentClient]:
        """Like `connected`, by any way to the agent."""
        import grpc

        options = [
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.min_reconnect_backoff_ms", 20_000),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.max_receive_message_length", _MESSAGE_LIMIT),
            ("grpc.max_send_message_length", _REQUEST_LIMIT),
            ("grpc.compression_enabled_algorithms_bitset", _UNCOMPRESSED),
            ("grpc.per_message_decompression", 0),
            ("grpc.max_metadata_size", 16 * 1024),
            ("grpc.http2.lookahead_bytes", 1 << 20),
            ("grpc.http2.max_frame_size", 256 * 1024),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        ]
        async with transport.relayed(dial, directory=directory) as relay:
            channel = grpc.aio.insecure_channel(f"unix:{relay.path}", options=options)
            bulk = BulkPort(bulk_path) if bulk_path is not None else None
            try:
                yield cls(relay, channel, bulk)
            finally:
                if bulk is not None:
                    await bulk.close()
                await channel.close()

    # ------------------------------------------------------------ sandbox

    async def reached(self, *, timeout: float) -> None:
        """Wait until the agent listens, so that what is asked next is on its way at once."""
        async with _within(timeout):
            await self._relay.ready()
            with translating():
                await self._channel.channel_ready()

    async def create_sandbox(self, request: pb.CreateSandboxRequest, *, timeout: float) -> pb.GuestDetails:
        """Give the guest its identity; AlreadyExistsError if it has one."""
        answer = await self._call(self._sandbox.CreateSandbox, request, timeout)
        details: pb.GuestDetails = answer.details
        check_phases(details.boot_phases_us)
        return details

    async def destroy_sandbox(self, *, power_off: bool, grace: float, timeout: float) -> None:
        """End every container, giving each `grace` seconds; with `power_off` the guest's disappearance is success."""
        pb = protocol()
        request = pb.DestroySandboxRequest(power_off=power_off, grace_ms=int(grace * 1000))
        try:
            await self._call(self._sandbox.DestroySandbox, request, timeout)
        except TimedOutError:
            raise
        except UnavailableError:
            if not power_off:
                raise

    async def details(self, *, timeout: float = QUICK) -> pb.GuestDetails:
        answer: pb.GuestDetails = await self._call(
            self._sandbox.GetGuestDetails, protocol().GetGuestDetailsRequest(), timeout
        )
        check_phases(answer.boot_phases_us)
        return answer

    async def read_time(self, *, timeout: float = QUICK) -> int:
        """What the guest's clock shows, in nanoseconds."""
        return await self.shift_time(0, timeout=timeout)

    async def shift_time(self, shift_ns: int, *, timeout: float = QUICK) -> int:
        """Set the guest's clock forward or back by so much, and answer what it shows then."""
        answer = await self._call(self._sandbox.SetTime, protocol().SetTimeRequest(shift_ns=shift_ns), timeout)
        return moment(answer.time_ns)

    async def reseed(self, entropy: bytes, *, timeout: float = QUICK) -> None:
        await self._call(self._sandbox.Reseed, protocol().ReseedRequest(entropy=entropy), timeout)

    async def online_cpus(self, count: int, timeout: float) -> tuple[int, int]:
        """Have `count` processors online; answers how many are, and how many are present."""
        request = protocol().OnlineCpusRequest(count=count, timeout_ms=int(timeout * 1000))
        answer = await self._call(self._sandbox.OnlineCpus, request, timeout + QUICK)
        if not 0 < answer.online <= answer.present <= _MOST_CPUS:
            raise broken(f"{answer.online} of {answer.present} processors are online")
        return answer.online, answer.present

    async def online_memory(self, total_kib: int, timeout: float, *, shrink: bool = False) -> tuple[int, int]:
        """Wait until the guest has so much memory; answers total and available KiB, reached or not."""
        request = protocol().OnlineMemoryRequest(total_kib=total_kib, timeout_ms=int(timeout * 1000), shrink=shrink)
        answer = await self._call(self._sandbox.OnlineMemory, request, timeout + QUICK)
        return answer.total_kib, answer.available_kib

    async def clear_memory(self, *, caches: bool = False, timeout: float = 2 * QUICK) -> None:
        """Have the guest's free memory hold nothing; with `caches`, free what it has read but does not use first."""
        await self._call(self._sandbox.ClearMemory, protocol().ClearMemoryRequest(caches=caches), timeout)

    async def add_storages(
        self, storages: Iterable[pb.Storage], *, timeout: float = 2 * QUICK
    ) -> dict[str, pb.StorageAddress]:
        """Mount all of them or none; answers where each disk was found, by mount point."""
        pb = protocol()
        request = pb.AddStoragesRequest(storages=storages)
        answer = await self._call(self._sandbox.AddStorages, request, timeout)
        addresses = {address.mount_point: address for address in answer.addresses}
        if not addresses.keys() <= {storage.mount_point for storage in request.storages}:
            raise broken("it has found disks that were not asked for")
        disks = (pb.Storage.DRIVER_BLOCK, pb.Storage.DRIVER_BLOCK_DEVICE)
        if not {storage.mount_point for storage in request.storages if storage.driver in disks} <= addresses.keys():
            raise broken("it does not say where it has found a disk")
        return addresses

    async def remove_storages(self, mount_points: Iterable[str], *, timeout: float = 2 * QUICK) -> None:
        await self._call(
            self._sandbox.RemoveStorages, protocol().RemoveStoragesRequest(mount_points=mount_points), timeout
        )

    async def metrics(self, *, timeout: float = QUICK) -> pb.Metrics:
        answer: pb.Metrics = await self._call(self._sandbox.GetMetrics, protocol().GetMetricsRequest(), timeout)
        return answer

    async def copy_in(self, container_id: str, path: str, archive: AsyncIterable[bytes], *, timeout: float) -> int:
        """Unpack a tar archive into a directory of a container (of the guest, for ""); answers its bytes."""
        pb = protocol()

        async def requests() -> AsyncIterator[Any]:
            yield pb.CopyInRequest(container_id=container_id, path=path)
            async for data in archive:
                for at in range(0, len(data), _ARCHIVE_CHUNK):
                    yield pb.CopyInRequest(data=data[at : at + _ARCHIVE_CHUNK])

        answer = await self._call(self._sandbox.CopyIn, requests(), timeout)
        return int(answer.bytes)

    async def copy_out(
        self, container_id: str, path: str, *, follow_link: bool = False, timeout: float
    ) -> AsyncIterator[bytes]:
        """A tar archive of a file or directory of a container, whose one top entry has the path's last name."""
        request = protocol().CopyOutRequest(container_id=container_id, path=path, follow_link=follow_link)
        async for answer in self._stream(self._sandbox.CopyOut, request, timeout):
            if answer.data:
                yield answer.data

    async def events(self) -> AsyncIterator[pb.Event]:
        """Exits and OOM kills; those that were not acknowledged come first, some perhaps twice.

        Raises UnavailableError and nothing else: there is no other reason to end.
        """
        try:
            async for answer in self._stream(self._sandbox.WatchEvents, protocol().WatchEventsRequest(), None):
                what = answer.WhichOneof("what")
                if what is None:
                    raise broken("an event says nothing")
                if what == "exited":
                    check_exit(answer.exited)
                yield answer
        except UnavailableError:
            raise
        except SandboxError as error:
            raise broken(f"it refuses to tell of events: {error}") from error

    async def write_files(self, files: Mapping[str, bytes], *, timeout: float = QUICK) -> None:
        """Replace the content of files that containers have mounted, e.g. ``hosts``."""
        await self._call(self._sandbox.WriteFiles, protocol().WriteFilesRequest(files=files), timeout)

    async def update_interface(self, interface: pb.Interface, *, timeout: float = QUICK) -> pb.Interface:
        request = protocol().UpdateInterfaceRequest(interface=interface, timeout_ms=int(timeout * 1000))
        answer: pb.Interface = await self._call(self._sandbox.UpdateInterface, request, timeout + QUICK)
        return answer

    async def remove_interface(self, name: str, *, timeout: float = QUICK) -> None:
        await self._call(self._sandbox.RemoveInterface, protocol().RemoveInterfaceRequest(name=name), timeout)

    async def interfaces(self, *, timeout: float = QUICK) -> list[pb.Interface]:
        answer = await self._call(self._sandbox.ListInterfaces, protocol().ListInterfacesRequest(), timeout)
        return [*answer.interfaces]

    async def update_routes(self, routes: Iterable[pb.Route], *, timeout: float = QUICK) -> list[pb.Route]:
        answer = await self._call(self._sandbox.UpdateRoutes, protocol().UpdateRoutesRequest(routes=routes), timeout)
        return [*answer.routes]

    async def routes(self, *, timeout: float = QUICK) -> list[pb.Route]:
        answer = await self._call(self._sandbox.ListRoutes, protocol().ListRoutesRequest(), timeout)
        return [*answer.routes]

    async def add_neighbours(self, neighbours: Iterable[pb.Neighbour], *, timeout: float = QUICK) -> None:
        request = protocol().AddNeighboursRequest(neighbours=neighbours)
        await self._call(self._sandbox.AddNeighbours, request, timeout)

    # ------------------------------------------------------------ containers

    async def create_container(
        self, request: pb.CreateContainerRequest, *, timeout: float
    ) -> pb.CreateContainerResponse:
        """Create a container, and start it if the request says so; on failure the guest keeps nothing of it.

        CommandNotFoundError and CommandNotExecutableError are about its program.
        """
        answer: pb.CreateContainerResponse = await self._call(self._container.CreateContainer, request, timeout)
        check_phases(answer.phases_us)
        return answer

    async def start_container(self, container_id: str, *, timeout: float = QUICK) -> None:
        request = protocol().StartContainerRequest(container_id=container_id)
        await self._call(self._container.StartContainer, request, timeout)

    async def remove_container(self, container_id: str, *, force: bool = False, timeout: float = 2 * QUICK) -> None:
        request = protocol().RemoveContainerRequest(container_id=container_id, force=force)
        await self._call(self._container.RemoveContainer, request, timeout)

    async def update_container(self, container_id: str, resources_json: bytes, *, timeout: float = QUICK) -> None:
        request = protocol().UpdateContainerRequest(container_id=container_id, resources_json=resources_json)
        await self._call(self._container.UpdateContainer, request, timeout)

    async def stats(self, container_id: str, *, timeout: float = QUICK) -> pb.ContainerStats:
        request = protocol().StatsContainerRequest(container_id=container_id)
        answer: pb.ContainerStats = await self._call(self._container.StatsContainer, request, timeout)
        return answer

    async def pause(self, container_id: str, *, timeout: float = QUICK) -> None:
        request = protocol().PauseContainerRequest(container_id=container_id)
        await self._call(self._container.PauseContainer, request, timeout)

    async def resume(self, container_id: str, *, timeout: float = QUICK) -> None:
        request = protocol().ResumeContainerRequest(container_id=container_id)
        await self._call(self._container.ResumeContainer, request, timeout)

    async def processes(self, container_id: str, *, timeout: float = QUICK) -> list[pb.ProcessRow]:
        request = protocol().ListProcessesRequest(container_id=container_id)
        answer = await self._call(self._container.ListProcesses, request, timeout)
        return [*answer.processes]

    async def containers(self, *, timeout: float = QUICK) -> list[pb.ContainerRow]:
        """What the agent knows, for a supervisor that takes over."""
        answer = await self._call(self._container.ListContainers, protocol().ListContainersRequest(), timeout)
        if sum(len(row.processes) for row in answer.containers) > _MOST_PROCESSES:
            raise broken(f"it has more than {_MOST_PROCESSES} processes")
        for row in answer.containers:
            for process in row.processes:
                check_process(process)
        return [*answer.containers]

    # ------------------------------------------------------------ processes

    async def exec(self, request: pb.ExecRequest, *, timeout: float) -> int:
        """Start a process in a running container; answers its pid in the guest."""
        answer = await self._call(self._process.Exec, request, timeout)
        return int(answer.guest_pid)

    async def signal(
        self,
        container_id: str,
        exec_id: str,
        signal: int,
        all: bool = False,
        *,
        timeout: float = QUICK,
    ) -> None:
        """Send a signal to a process, or to all of its container; InvalidStateError if it has ended."""
        request = protocol().SignalRequest(container_id=container_id, exec_id=exec_id, signal=signal, all=all)
        await self._call(self._process.Signal, request, timeout)

    async def wait(self, container_id: str, exec_id: str, *, timeout: float | None = None) -> pb.ExitStatus:
        """Wait for a process' end, for ever unless there is a timeout."""
        request = protocol().WaitRequest(container_id=container_id, exec_id=exec_id)
        answer: pb.ExitStatus = await self._call(self._process.Wait, request, timeout)
        check_exit(answer)
        return answer

    async def acknowledge(self, container_id: str, exec_id: str, *, timeout: float = QUICK) -> None:
        """Let the agent forget an ended exec."""
        request = protocol().AcknowledgeRequest(container_id=container_id, exec_id=exec_id)
        await self._call(self._process.Acknowledge, request, timeout)

    async def resize(self, container_id: str, exec_id: str, columns: int, rows: int, *, timeout: float = QUICK) -> None:
        request = protocol().ResizeRequest(container_id=container_id, exec_id=exec_id, columns=columns, rows=rows)
        await self._call(self._process.Resize, request, timeout)

    def attach(self, container_id: str, exec_id: str, *, stdout_offset: int = 0, stderr_offset: int = 0) -> Attachment:
        """A process' streams from these offsets on; use it as an async context manager."""
        return Attachment(
            self._relay,
            self._process.Attach,
            container_id,
            exec_id,
            stdout_offset=stdout_offset,
            stderr_offset=stderr_offset,
            port=self._bulk,
        )

    def names(self, address: str) -> Names:
        """Have the guest ask us what it is asked at a loopback address, for an ``async with`` block."""
        return Names(self._relay, self._sandbox.AnswerNames, address)

    # ------------------------------------------------------------ calling

    async def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        async with _within(timeout):
            await self._relay.ready()
            with translating():
                answer = await method(request, timeout=timeout, wait_for_ready=True)
        check_bounds(answer)
        return answer

    async def _stream(self, method: Any, request: Any, timeout: float | None) -> AsyncIterator[Any]:
        await self._relay.ready()
        with translating():
            call = method(request, timeout=timeout, wait_for_ready=True)
            try:
                async for answer in call:
                    check_bounds(answer)
                    yield answer
            finally:
                call.cancel()


@asynccontextmanager
async def _within(timeout: float | None) -> AsyncIterator[None]:
    """The agent has so many seconds for the block."""
    try:
        async with asyncio.timeout(timeout):
            yield
    except TimeoutError:
        raise TimedOutError(f"the agent has not answered within {timeout:g} s") from None
