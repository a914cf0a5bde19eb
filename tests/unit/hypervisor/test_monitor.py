"""The link to the monitor, against a server that says whatever it likes: a guest may have taken QEMU over."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vmsandbox_hypervisor.api import Kernel as KernelFile
from vmsandbox_hypervisor.api import Memory, VmConfig
from vmsandbox_hypervisor.errors import DeviceError, MonitorError, NoSlotError
from vmsandbox_hypervisor.qemu.hotplug import Devices
from vmsandbox_hypervisor.qemu.hotplug_cpu import Cpus
from vmsandbox_hypervisor.qemu.hotplug_memory import Memory as GuestMemory
from vmsandbox_hypervisor.qemu.monitor import CommandError, LinkError, Monitor, connected

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}


class Server:
    """Plays QEMU: `answers` maps a command to its reply, or to a function of its arguments."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {"qmp_capabilities": {}}
        self.commands: list[tuple[str, dict[str, Any]]] = []
        self.greeting: dict[str, Any] = GREETING
        self.writer: asyncio.StreamWriter | None = None

    def event(self, name: str, **data: Any) -> None:
        self.send({"event": name, "data": data, "timestamp": {"seconds": 5, "microseconds": 250000}})

    def send(self, message: Any) -> None:
        assert self.writer is not None
        self.writer.write(json.dumps(message).encode() + b"\r\n")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.send(self.greeting)
        try:
            text = ""
            while data := await reader.read(65536):
                # Commands are not separated by anything, as QEMU takes them.
                request, end = json.JSONDecoder().raw_decode((text + data.decode()).lstrip())
                text = (text + data.decode()).lstrip()[end:]
                name, arguments = request["execute"], request.get("arguments", {})
                self.commands.append((name, arguments))
                answer = self.answers.get(name, {})
                if callable(answer):
                    answer = answer(arguments)
                # The negotiation comes without an id.
                identity = {"id": request["id"]} if "id" in request else {}
                if isinstance(answer, Exception):
                    self.send({"error": {"class": "GenericError", "desc": str(answer)}, **identity})
                elif answer is not None:
                    self.send({"return": answer, **identity})
        except ConnectionError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def linked(path: Path, server: Server) -> AsyncIterator[Monitor]:
    listener = await asyncio.start_unix_server(server.serve, str(path / "qmp.sock"))
    async with listener, connected(path / "qmp.sock", timeout=2) as link:
        yield link


async def test_a_refusal_carries_qemu_s_words(tmp_path: Path) -> None:
    server = Server()
    server.answers["device_add"] = RuntimeError("Bus 'rp9' not found")
    async with linked(tmp_path, server) as link:
        with pytest.raises(CommandError) as caught:
            await link.execute("device_add", {"driver": "x"})
        assert caught.value.reason == "Bus 'rp9' not found"
        assert str(caught.value) == "QEMU refused 'device_add': Bus 'rp9' not found"


async def test_a_command_without_an_answer_is_given_up(tmp_path: Path) -> None:
    server = Server()
    server.answers["stop"] = lambda _: None
    async with linked(tmp_path, server) as link:
        with pytest.raises(LinkError, match=r"did not answer 'stop' within 0\.05 s"):
            await link.execute("stop", timeout=0.05)
        assert await link.execute("cont") == {}


async def test_the_end_of_the_link_ends_the_command(tmp_path: Path) -> None:
    server = Server()

    def hang_up(_: object) -> None:
        assert server.writer is not None
        server.writer.close()

    server.answers["stop"] = hang_up
    async with linked(tmp_path, server) as link:
        with pytest.raises(LinkError, match="QEMU ended during 'stop'"):
            await link.execute("stop")
        with pytest.raises(LinkError, match="no link to QEMU for 'cont'"):
            await link.execute("cont")
        await link.closed()


@pytest.mark.parametrize("greeting", [{"hello": 1}, {"QMP": 7}, []])
async def test_somebody_who_is_no_monitor_is_not_talked_to(tmp_path: Path, greeting: Any) -> None:
    server = Server()
    server.greeting = greeting
    with pytest.raises(LinkError, match="cannot connect to QEMU's monitor"):
        async with linked(tmp_path, server):
            pytest.fail("connected")


@pytest.mark.parametrize(
    "rubbish", [b"not json\r\n", b"[1, 2]\r\n", b"\xff\xfe\r\n", b"{}" * 6_000_000, b"[" * 100_000 + b"\n"]
)
async def test_rubbish_breaks_the_link_and_nothing_else(tmp_path: Path, rubbish: bytes) -> None:
    server = Server()

    def babble(_: object) -> None:
        assert server.writer is not None
        server.writer.write(rubbish)

    server.answers["stop"] = babble
    async with linked(tmp_path, server) as link:
        with pytest.raises(LinkError):
            await link.execute("stop")


async def test_events_reach_everybody_with_their_time(tmp_path: Path) -> None:
    server = Server()
    seen = []
    async with linked(tmp_path, server) as link:
        link.observe(lambda event: seen.append(event.name))
        first, second = link.subscribe(), link.subscribe()
        with link.expected(lambda event: event.data.get("device") == "b") as wanted:
            server.event("DEVICE_DELETED", device="a")
            server.event("DEVICE_DELETED", device="b")
            event = await wanted
        assert (event.name, event.data, event.time) == ("DEVICE_DELETED", {"device": "b"}, 5.25)
        for subscription in (first, second):
            assert [(await anext(subscription)).data["device"] for _ in range(2)] == ["a", "b"]
        assert seen == ["DEVICE_DELETED"] * 2


async def test_odd_events_are_harmless(tmp_path: Path) -> None:
    server = Server()
    async with linked(tmp_path, server) as link:
        events = link.subscribe()
        for odd in ({"event": 7}, {"event": "A", "data": [1], "timestamp": "now"}, {"event": "B", "timestamp": {}}):
            server.send(odd)
        for seconds, micros in ((1, "x"), (10**400, 0), (1, None)):
            server.send({"event": "C", "timestamp": {"seconds": seconds, "microseconds": micros}})
        told = [await anext(events) for _ in range(6)]
        assert [event.name for event in told] == ["7", "A", "B", "C", "C", "C"]
        assert {event.time for event in told} == {0.0}
        assert await link.execute("cont") == {}


async def test_who_waits_for_an_event_learns_of_the_end(tmp_path: Path) -> None:
    async with linked(tmp_path, Server()) as link:
        error = MonitorError("it is gone")
        with link.expected(lambda _: True) as before:
            link.fail(error)
            with pytest.raises(MonitorError, match="it is gone"):
                await before
        with link.expected(lambda _: True) as after, pytest.raises(MonitorError, match="it is gone"):
            await after
        assert [event async for event in link.subscribe()] == []


async def test_a_descriptor_travels_with_its_command(tmp_path: Path) -> None:
    """A plain socket in the server's place, to see the ancillary data."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "qmp.sock"))
    listener.listen()

    def serve() -> tuple[list[str], str]:
        peer, _ = listener.accept()
        names, fds = [], []
        with peer:
            peer.sendall(json.dumps(GREETING).encode() + b"\n")
            while len(names) < 3:
                data, received, _, _ = socket.recv_fds(peer, 65536, 4)
                fds += received
                if data.strip():
                    request = json.loads(data)
                    names.append(request["execute"])
                    answer = {"fdset-id": 3, "fd": 9} if request["execute"] == "add-fd" else {}
                    identity = {"id": request["id"]} if "id" in request else {}
                    peer.sendall(json.dumps({"return": answer, **identity}).encode() + b"\n")
        content = "".join(os.pread(fd, 10, 0).decode() for fd in fds)
        for fd in fds:
            os.close(fd)
        return names, content

    served = asyncio.create_task(asyncio.to_thread(serve))
    files = []
    for content in (b"one", b"two"):
        fd = os.memfd_create("file")
        os.write(fd, content)
        files.append(fd)
    try:
        async with connected(tmp_path / "qmp.sock", timeout=2) as link:
            await link.getfd("first", files[0])
            assert await link.add_fd(files[1]) == 3
            assert await served == (["qmp_capabilities", "getfd", "add-fd"], "onetwo")
    finally:
        listener.close()
        for fd in files:
            os.close(fd)


# ---------------------------------------------------------------- answers of a shape nobody expects


CONFIG = VmConfig(
    name="odd",
    directory=Path("/nonexistent"),
    kernel=KernelFile(path=Path("/nonexistent")),
    memory=Memory(size_mib=256, hotplug_mib=512),
)
ODD: list[Any] = [7, "text", [1], {"a": 1}, [{"type": "virtio-mem"}], [{"type": "dimm", "data": {"size": "x"}}]]
ODD += [[{"props": {"socket-id": "x"}}], [{"props": {"core-id": None}}]]


@pytest.mark.parametrize("answer", ODD)
async def test_an_answer_of_another_shape_is_an_error_of_ours(tmp_path: Path, answer: Any) -> None:
    server = Server()
    for command in ("query-memory-devices", "query-hotpluggable-cpus", "query-pci", "qom-list"):
        server.answers[command] = answer
    async with linked(tmp_path, server) as link:
        with pytest.raises(MonitorError):
            await GuestMemory(CONFIG, link).state()
        with pytest.raises(MonitorError):
            await Cpus(link, unpluggable=False).change(2, timeout=1)


# ---------------------------------------------------------------- vCPUs that may go


class Sockets:
    """The hot-pluggable CPUs of a machine with KVM: `stubborn` ones are not given up."""

    def __init__(self, server: Server, *, count: int, present: int, stubborn: tuple[str, ...] = ()) -> None:
        self.server = server
        self.paths: list[str | None] = [
            "/machine/unattached/device[0]" if n == 0 else f"/machine/peripheral/cpu-0-{n}-0" if n < present else None
            for n in range(count)
        ]
        self.stubborn = stubborn
        server.answers["query-hotpluggable-cpus"] = self.listing
        server.answers["device_add"] = self.add
        server.answers["device_del"] = self.delete

    def listing(self, _: object) -> list[dict[str, Any]]:
        # QEMU lists the last one first.
        return [
            {
                "type": "max-x86_64-cpu",
                "props": {"socket-id": 0, "core-id": number, "thread-id": 0},
                "vcpus-count": 1,
                **({"qom-path": path} if path else {}),
            }
            for number, path in reversed(list(enumerate(self.paths)))
        ]

    def add(self, arguments: dict[str, Any]) -> dict[str, Any]:
        self.paths[arguments["core-id"]] = f"/machine/peripheral/{arguments['id']}"
        return {}

    def delete(self, arguments: dict[str, Any]) -> dict[str, Any] | Exception:
        path = f"/machine/peripheral/{arguments['id']}"
        if arguments["id"] in self.stubborn:
            self.server.event("DEVICE_UNPLUG_GUEST_ERROR", path=path, device=arguments["id"])
            return {}
        self.paths[self.paths.index(path)] = None
        self.server.event("DEVICE_DELETED", path=path)
        return {}


def plugged(server: Server, command: str) -> list[str]:
    return [arguments["id"] for name, arguments in server.commands if name == command]


async def test_vcpus_come_in_order_with_the_properties_qemu_names(tmp_path: Path) -> None:
    server = Server()
    Sockets(server, count=4, present=1)
    async with linked(tmp_path, server) as link:
        state = await Cpus(link, unpluggable=True).change(3, timeout=1)
    assert (state.present, state.maximum, state.surplus) == (3, 4, 0)
    added = [arguments for name, arguments in server.commands if name == "device_add"]
    assert added == [
        {
            "driver": "max-x86_64-cpu", "id": f"cpu-0-{number}-0",
            "socket-id": 0, "core-id": number, "thread-id": 0,
        }
        for number in (1, 2)
    ]  # fmt: skip


async def test_with_kvm_the_last_vcpus_go_first_and_the_boot_ones_stay(tmp_path: Path) -> None:
    server = Server()
    Sockets(server, count=4, present=4)
    async with linked(tmp_path, server) as link:
        cpus = Cpus(link, unpluggable=True)
        state = await cpus.change(2, timeout=1)
        assert (state.present, state.surplus) == (2, 0)
        assert plugged(server, "device_del") == ["cpu-0-3-0", "cpu-0-2-0"]


async def test_a_vcpu_the_guest_keeps_is_surplus(tmp_path: Path) -> None:
    server = Server()
    Sockets(server, count=4, present=4, stubborn=("cpu-0-2-0",))
    async with linked(tmp_path, server) as link:
        state = await Cpus(link, unpluggable=True).change(1, timeout=1)
        assert (state.present, state.surplus) == (3, 2)


async def test_a_guest_that_does_not_answer_keeps_its_vcpus(tmp_path: Path) -> None:
    server = Server()
    Sockets(server, count=4, present=4)
    server.answers["device_del"] = {}
    async with linked(tmp_path, server) as link:
        state = await Cpus(link, unpluggable=True).change(1, timeout=0.05)
        assert (state.present, state.surplus) == (4, 3)


async def test_without_kvm_no_vcpu_is_ever_unplugged(tmp_path: Path) -> None:
    server = Server()
    Sockets(server, count=4, present=4)
    async with linked(tmp_path, server) as link:
        cpus = Cpus(link, unpluggable=False)
        state = await cpus.change(1, timeout=1)
        assert (state.present, state.surplus) == (4, 3)
        with pytest.raises(NoSlotError):
            await cpus.change(5, timeout=1)
        assert plugged(server, "device_del") == []


async def test_a_vcpu_that_qemu_refuses_is_an_error_in_its_words(tmp_path: Path) -> None:
    server = Server()
    Sockets(server, count=4, present=1)
    server.answers["device_add"] = RuntimeError("no room")
    async with linked(tmp_path, server) as link:
        with pytest.raises(DeviceError, match="cannot add a vCPU after 0: no room"):
            await Cpus(link, unpluggable=False).change(3, timeout=1)


# ---------------------------------------------------------------- PCI devices


@pytest.fixture
def devices(tmp_path: Path) -> Callable[[Monitor], Devices]:
    config = VmConfig(
        name="d", directory=tmp_path, kernel=KernelFile(path=tmp_path), memory=Memory(size_mib=256), root_ports=2
    )
    return lambda link: Devices(config, link, stderr=2, helper_ended=lambda _: None)


PCI = [
    {
        "bus": 0,
        "devices": [
            {"bus": 0, "slot": 0, "qdev_id": ""},
            {"bus": 0, "slot": 1, "qdev_id": "rp0", "pci_bridge": {"bus": {}, "devices": [{"qdev_id": "disk-a"}]}},
            {"bus": 0, "slot": 1, "qdev_id": "rp1", "pci_bridge": {"bus": {}}},
        ],
    }
]


async def test_an_unplug_that_a_predecessor_asked_for_is_only_awaited(
    tmp_path: Path, devices: Callable[[Monitor], Devices]
) -> None:
    server = Server()
    server.answers["query-pci"] = PCI
    server.answers["qom-list"] = [{"name": "disk-a", "type": "child<virtio-blk-pci>"}]

    def refuse(_: object) -> Exception:
        server.event("DEVICE_DELETED", device="disk-a", path="/machine/peripheral/disk-a")
        return RuntimeError("Device disk-a is already in the process of unplug")

    server.answers["device_del"] = refuse
    async with linked(tmp_path, server) as link:
        found = devices(link)
        link.observe(found.observe)
        await found.load()
        assert {name: at.pci_path for name, at in found.addresses().items()} == {"disk-a": "01.0/00.0"}
        await found.detach("disk-a", timeout=1)
        assert found.addresses() == {}
    assert ("blockdev-del", {"node-name": "disk-a"}) in server.commands


async def test_an_unplug_that_the_guest_was_late_for_is_awaited_by_whoever_asks_again(
    tmp_path: Path, devices: Callable[[Monitor], Devices]
) -> None:
    server = Server()
    server.answers["query-pci"] = PCI
    async with linked(tmp_path, server) as link:
        found = devices(link)
        link.observe(found.observe)
        await found.load()
        with pytest.raises(DeviceError, match="did not release it within"):
            await found.detach("disk-a", timeout=0.01)
        assert set(found.addresses()) == {"disk-a"}
        again = asyncio.create_task(found.detach("disk-a", timeout=5))
        await asyncio.sleep(0)
        server.event("DEVICE_DELETED", device="disk-a")
        await again
        assert found.addresses() == {}
    assert plugged_names(server).count("device_del") == 1


@pytest.mark.parametrize("name", ["rp", "rpx", "rp-1", "rp9999", 7])
async def test_a_port_that_is_none_of_ours_has_nothing_of_ours(
    tmp_path: Path, devices: Callable[[Monitor], Devices], name: object
) -> None:
    server = Server()
    bridge = {"qdev_id": name, "pci_bridge": {"devices": [{"qdev_id": "disk-a"}]}}
    server.answers["query-pci"] = [{"devices": [bridge]}]
    async with linked(tmp_path, server) as link:
        found = devices(link)
        await found.load()
        assert found.addresses() == {}


async def test_a_guest_that_refuses_to_let_go_is_believed_at_once(
    tmp_path: Path, devices: Callable[[Monitor], Devices]
) -> None:
    server = Server()
    server.answers["query-pci"] = PCI

    def refuse(_: object) -> dict[str, Any]:
        server.event("DEVICE_UNPLUG_GUEST_ERROR", device="disk-a")
        return {}

    server.answers["device_del"] = refuse
    async with linked(tmp_path, server) as link:
        found = devices(link)
        await found.load()
        with pytest.raises(DeviceError, match="the guest refused") as caught:
            await found.detach("disk-a", timeout=1)
        assert caught.value.reason == "DEVICE_UNPLUG_GUEST_ERROR"
        assert set(found.addresses()) == {"disk-a"}


async def test_a_device_the_guest_gave_back_unasked_is_cleared_away_behind(
    tmp_path: Path, devices: Callable[[Monitor], Devices]
) -> None:
    server = Server()
    server.answers["query-pci"] = PCI
    async with linked(tmp_path, server) as link:
        found = devices(link)
        link.observe(found.observe)
        await found.load()
        events = link.subscribe()
        server.event("DEVICE_DELETED", device="disk-a")
        await anext(events)
        assert found.addresses() == {}
        await found.detach("disk-a", timeout=1)
        assert plugged_names(server) == ["query-pci", "blockdev-del"]


def plugged_names(server: Server) -> list[str]:
    return [name for name, _ in server.commands if name != "qmp_capabilities"]
