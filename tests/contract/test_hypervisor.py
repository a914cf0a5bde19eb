"""What every hypervisor does, asked of the fake and of QEMU: a fake that drifts is worse than none."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.taps import tap
from vmsandbox_hypervisor.api import (
    Disk,
    Kernel,
    Memory,
    Nic,
    NinePShare,
    PciAddress,
    PrivateMemory,
    SecurityLabels,
    SharedMemory,
    VirtiofsShare,
)
from vmsandbox_hypervisor.errors import BootError, DeviceError, ExitedError, ForkError, NoSlotError
from vmsandbox_hypervisor.qemu.machine import QemuHypervisor
from vmsandbox_hypervisor.qemu.template import empty_memory, fill_memory
from vmsandbox_hypervisor.testing import (
    FakeHypervisor,
    FakeVm,
    Stage,
    booted,
    vm_config,
    vm_confinement,
    vm_cpus,
    vm_directory,
    vm_files,
    vm_ports,
    vm_template,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from contextlib import AbstractAsyncContextManager

    from vmsandbox_hypervisor.api import Hypervisor, Vm, VmConfig

__all__ = ["tap", "vm_config", "vm_confinement", "vm_cpus", "vm_directory", "vm_files", "vm_ports", "vm_template"]

pytestmark = pytest.mark.deadline(90)


@pytest.fixture(scope="module")
def vm_memory() -> Memory:
    return Memory(size_mib=256, hotplug_mib=512, dimm_slots=1, dimm_mib=256)


@pytest.fixture(params=["fake", "qemu"])
def any_hypervisor(request: pytest.FixtureRequest) -> Hypervisor:
    return FakeHypervisor() if request.param == "fake" else QemuHypervisor()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(1024 * 1024))
    return path


def kill(vm: Vm) -> None:
    """End the VM behind its owner's back."""
    if isinstance(vm, FakeVm):
        vm.die(-signal.SIGKILL)
    else:
        os.kill(vm.pid, signal.SIGKILL)


@pytest.fixture
def answering(any_hypervisor: Hypervisor, vm_config: VmConfig) -> Stage[Vm]:
    """A machine whose guest lets devices go."""
    if isinstance(any_hypervisor, FakeHypervisor):
        return Stage(lambda: any_hypervisor.running(vm_config))

    @asynccontextmanager
    async def block() -> AsyncIterator[Vm]:
        async with booted(any_hypervisor.running(vm_config)) as (vm, _):
            yield vm

    return Stage(block)


@pytest.fixture
def running(any_hypervisor: Hypervisor, vm_config: VmConfig) -> Stage[Vm]:
    """A machine that was just started."""
    return Stage(lambda: any_hypervisor.running(vm_config))


async def test_a_device_keeps_its_address_until_it_is_detached(
    answering: Stage[Vm], image: Path, tmp_path: Path
) -> None:
    async with answering as vm:
        first = await vm.attach_disk(Disk(id="a", path=image, read_only=True))
        second = await vm.attach_disk(Disk(id="b", path=image, read_only=True))
        share = await vm.attach_virtiofs(VirtiofsShare(tag="s", path=tmp_path))
        assert [first.pci_path, second.pci_path, share.pci_path] == ["01.0/00.0", "01.1/00.0", "01.2/00.0"]
        assert dict(vm.devices()) == {"disk-a": first, "disk-b": second, "fs-s": share}
        assert set(vm.helper_pids()) == {"s"}
        await vm.detach_disk("a")
        await vm.detach_virtiofs("s")
        assert dict(vm.devices()) == {"disk-b": second}
        assert not vm.helper_pids()
        assert await vm.attach_disk(Disk(id="c", path=image, read_only=True)) == first
        await vm.detach_disk("b")
        await vm.detach_disk("c")
        with pytest.raises(DeviceError, match="no such device"):
            await vm.detach_disk("c")


async def test_a_network_card_of_the_start_has_a_place_and_can_go(
    any_hypervisor: Hypervisor, vm_config: VmConfig, image: Path, tap: int
) -> None:
    config = replace(vm_config, nics=(Nic(id="first", tap_fd=tap, mac="02:00:00:00:00:01", mtu=0),))
    opening = any_hypervisor.running(config)
    async with opening if isinstance(any_hypervisor, FakeHypervisor) else machine_of(booted(opening)) as vm:
        assert dict(vm.devices()) == {"nic-first": PciAddress(pci_path="01.0/00.0")}
        assert (await vm.attach_disk(Disk(id="a", path=image, read_only=True))).pci_path == "01.1/00.0"
        with pytest.raises(DeviceError, match="attached already"):
            await vm.attach_nic(config.nics[0])
        await vm.detach_nic("first")
        assert set(vm.devices()) == {"disk-a"}
        assert (await vm.attach_nic(config.nics[0])).pci_path == "01.0/00.0"


@asynccontextmanager
async def machine_of(opening: AbstractAsyncContextManager[tuple[Vm, object]]) -> AsyncIterator[Vm]:
    async with opening as (vm, _):
        yield vm


async def test_what_is_behind_a_disk_can_be_replaced_and_only_there(
    any_hypervisor: Hypervisor, vm_config: VmConfig, image: Path, tmp_path: Path
) -> None:
    config = replace(vm_config, disks=(*vm_config.disks, Disk(id="slot", path=image, read_only=True)))
    others = [tmp_path / "first", tmp_path / "second"]
    async with any_hypervisor.running(config) as vm:
        for other in others:
            other.write_bytes(bytes(2 * 1024 * 1024))
            await vm.replace_disk(Disk(id="slot", path=other, read_only=True))
            assert vm.config.disks[-1].path == other
        if not isinstance(vm, FakeVm):
            opened = {os.readlink(link) for link in Path(f"/proc/{vm.pid}/fd").iterdir()}
            assert str(others[1]) in opened
            assert str(others[0]) not in opened
        for wrong in (
            Disk(id="other", path=image, read_only=True),
            Disk(id="slot", path=image),
            Disk(id="slot", path=tmp_path / "missing", read_only=True),
            Disk(id="slot", path=tmp_path, read_only=True),
        ):
            with pytest.raises(DeviceError):
                await vm.replace_disk(wrong)
        assert vm.config.disks[-1].path == others[1]


async def test_memory_grows_exactly_and_shrinks(answering: Stage[Vm]) -> None:
    async with answering as vm:
        state = await vm.set_memory(301)
        assert (state.base_mib, state.plugged_mib, state.requested_mib) == (256, 46, 46)
        await vm.attach_dimm("d", 128)
        state = await vm.memory()
        assert (state.plugged_mib, state.requested_mib) == (174, 174)
        # What a guest gives back is its own affair; a fake's gives everything.
        state = await vm.set_memory(384, timeout=2)
        assert state.requested_mib == 128
        assert 128 <= state.plugged_mib <= 160
        with pytest.raises(NoSlotError, match="at most 896 MiB"):
            await vm.set_memory(897)
        with pytest.raises(NoSlotError, match="slots"):
            await vm.attach_dimm("e", 128)
        with pytest.raises(DeviceError, match="multiples of 128"):
            await vm.attach_dimm("e", 100)
        assert (await vm.memory()).requested_mib == 128


async def test_a_balloon_takes_a_slot_once_and_only_where_memory_is_shared(
    any_hypervisor: Hypervisor, vm_config: VmConfig
) -> None:
    async with any_hypervisor.running(vm_config) as vm:
        address = await vm.attach_balloon()
        assert dict(vm.devices()) == {"balloon": address}
        with pytest.raises(DeviceError, match="attached already"):
            await vm.attach_balloon()
    memory = empty_memory(vm_config.memory.size_mib)
    try:
        private = replace(vm_config.memory, backing=PrivateMemory(fd=memory))
        async with any_hypervisor.running(replace(vm_config, memory=private)) as vm:
            with pytest.raises(DeviceError, match="not mapped shared"):
                await vm.attach_balloon()
    finally:
        os.close(memory)


async def test_the_number_of_cpus_only_grows_without_kvm(running: Stage[Vm]) -> None:
    async with running as vm:
        assert await vm.cpus() == await vm.set_cpus(1)
        state = await vm.set_cpus(3)
        assert (state.present, state.maximum, state.surplus) == (3, 4, 0)
        state = await vm.set_cpus(2)
        assert (state.present, state.maximum, state.surplus) == (3, 4, 1)
        for count, error in [(5, NoSlotError), (0, DeviceError)]:
            with pytest.raises(error):
                await vm.set_cpus(count)
        assert (await vm.cpus()).present == 3


async def test_nothing_is_attached_when_no_slot_is_free(
    any_hypervisor: Hypervisor, vm_config: VmConfig, image: Path, tmp_path: Path
) -> None:
    async with any_hypervisor.running(replace(vm_config, root_ports=1)) as vm:
        await vm.attach_disk(Disk(id="a", path=image, read_only=True))
        before = dict(vm.devices())
        with pytest.raises(NoSlotError, match="all 1 root ports"):
            await vm.attach_disk(Disk(id="b", path=image, read_only=True))
        with pytest.raises(NoSlotError):
            await vm.attach_virtiofs(VirtiofsShare(tag="s", path=tmp_path))
        assert dict(vm.devices()) == before
        assert not vm.helper_pids()


async def test_a_second_device_of_the_same_name_is_refused(running: Stage[Vm], image: Path) -> None:
    async with running as vm:
        await vm.attach_disk(Disk(id="a", path=image, read_only=True))
        with pytest.raises(DeviceError, match="attached already"):
            await vm.attach_disk(Disk(id="a", path=image, read_only=True))
        assert set(vm.devices()) == {"disk-a"}


@pytest.mark.parametrize("bad", ["", "a,b", "../x", "x" * 129, "a b", "-a"])
async def test_an_id_that_qemu_would_take_apart_is_refused(running: Stage[Vm], image: Path, bad: str) -> None:
    async with running as vm:
        with pytest.raises(DeviceError, match="bad disk id"):
            await vm.attach_disk(Disk(id=bad, path=image, read_only=True))
        assert not vm.devices()


async def test_shares_that_cannot_be_are_refused(
    any_hypervisor: Hypervisor, vm_config: VmConfig, tmp_path: Path
) -> None:
    late = NinePShare(tag="late", path=tmp_path)
    there = NinePShare(tag="there", path=tmp_path, plugged=True)
    config = replace(vm_config, shares=(there,), confinement=None)
    async with any_hypervisor.running(config) as vm:
        with pytest.raises(DeviceError, match="declare it"):
            await vm.attach_9p(late)
        with pytest.raises(DeviceError, match="from the start"):
            await vm.attach_9p(there)
        with pytest.raises(DeviceError, match="no such directory"):
            await vm.attach_virtiofs(VirtiofsShare(tag="s", path=tmp_path / "none"))
        assert not vm.devices()


async def test_private_memory_cannot_be_shared(any_hypervisor: Hypervisor, vm_config: VmConfig, tmp_path: Path) -> None:
    fd = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.ftruncate(fd, 256 << 20)
    try:
        config = replace(vm_config, memory=Memory(size_mib=256, backing=PrivateMemory(fd=fd)))
        async with any_hypervisor.running(config) as vm:
            with pytest.raises(DeviceError, match="mapped shared"):
                await vm.attach_virtiofs(VirtiofsShare(tag="s", path=tmp_path))
    finally:
        os.close(fd)


async def test_pause_and_resume_show_in_status_and_events(running: Stage[Vm]) -> None:
    async with running as vm:
        events = vm.events()
        assert await vm.status() == "running"
        await vm.pause()
        assert await vm.status() == "paused"
        await vm.resume()
        assert await vm.status() == "running"
        seen = []
        async for event in events:
            seen.append(event.name)
            if event.name == "RESUME":
                break
        assert [name for name in seen if name in ("STOP", "RESUME")] == ["STOP", "RESUME"]


async def test_killing_it_is_no_failure(running: Stage[Vm]) -> None:
    async with running as vm:
        await vm.kill()
        assert await vm.wait() == -signal.SIGKILL
        assert vm.ended() is None
        with pytest.raises(ExitedError):
            await vm.status()


async def test_its_death_is_one_error_for_everybody(running: Stage[Vm], image: Path) -> None:
    async with running as vm:
        events = vm.events()
        waiting = asyncio.create_task(vm.wait())
        assert vm.ended() is None
        kill(vm)
        assert await waiting == -signal.SIGKILL
        assert [event async for event in events] == []
        error = vm.ended()
        assert error is not None
        assert error.status == -signal.SIGKILL
        assert str(error) == "virtual machine 'test' was killed by SIGKILL"
        for operation in (
            vm.attach_disk(Disk(id="a", path=image)),
            vm.detach_disk("a"),
            vm.set_cpus(2),
            vm.set_memory(300),
            vm.pause(),
        ):
            with pytest.raises(ExitedError) as caught:
                await operation
            assert caught.value is error
        assert [event async for event in vm.events()] == []


async def test_leaving_the_block_ends_it(any_hypervisor: Hypervisor, vm_config: VmConfig) -> None:
    async with any_hypervisor.running(vm_config) as vm:
        pid, start_time = vm.pid, vm.start_time
    assert await vm.wait() == -signal.SIGKILL
    with pytest.raises(ExitedError, match="gone"):
        async with any_hypervisor.adopted(vm_config, pid=pid, start_time=start_time):
            pytest.fail("adopted a machine that is gone")


async def test_a_released_machine_goes_on_and_can_be_adopted(
    any_hypervisor: Hypervisor, vm_config: VmConfig, image: Path
) -> None:
    async with any_hypervisor.running(vm_config) as vm:
        address = await vm.attach_disk(Disk(id="a", path=image, read_only=True))
        await vm.set_cpus(2)
        vm.release()
    async with any_hypervisor.adopted(vm_config, pid=vm.pid, start_time=vm.start_time) as again:
        assert (again.pid, again.start_time) == (vm.pid, vm.start_time)
        assert set(again.phases) == {"monitor", "running"}
        assert dict(again.devices()) == {"disk-a": address}
        assert (await again.cpus()).present == 2
        assert await again.attach_disk(Disk(id="b", path=image, read_only=True)) == PciAddress(pci_path="01.1/00.0")
    assert again.ended() is None


async def test_another_process_is_never_adopted(any_hypervisor: Hypervisor, vm_config: VmConfig) -> None:
    with pytest.raises(ExitedError):
        async with any_hypervisor.adopted(vm_config, pid=os.getpid(), start_time=1):
            pytest.fail("adopted this very process")


async def test_a_machine_that_nobody_holds_can_be_destroyed(
    any_hypervisor: Hypervisor, vm_config: VmConfig, tmp_path: Path
) -> None:
    async with any_hypervisor.running(vm_config) as vm:
        await vm.attach_virtiofs(VirtiofsShare(tag="s", path=tmp_path))
        vm.release()
    for _ in range(2):
        await any_hypervisor.destroy(vm_config, pid=vm.pid, start_time=vm.start_time)
        with pytest.raises(ExitedError, match="gone"):
            async with any_hypervisor.adopted(vm_config, pid=vm.pid, start_time=vm.start_time):
                pytest.fail("adopted a machine that is gone")


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": Kernel(path=Path("/nonexistent/vmlinux"))},
        {"disks": (Disk(id="a", path=Path("/nonexistent/disk")),)},
        {"disks": (Disk(id="a,b", path=Path("/dev/null")),)},
        {"memory": Memory(size_mib=256, hotplug_mib=3)},
        {"root_ports": 1000},
    ],
    ids=["kernel", "disk", "id", "memory", "ports"],
)
async def test_what_cannot_start_says_so_before_anything_runs(
    any_hypervisor: Hypervisor, vm_config: VmConfig, change: dict[str, object]
) -> None:
    with pytest.raises(BootError, match="cannot start virtual machine 'test': ") as caught:
        async with any_hypervisor.running(replace(vm_config, **change)):  # type: ignore[arg-type]
            pytest.fail("it started")
    assert caught.value.phase == "prepared"


async def test_a_port_that_was_not_declared_has_no_path(running: Stage[Vm], vm_config: VmConfig) -> None:
    async with running as vm:
        name = vm_config.ports[0].name
        assert vm.port_path(name).parent == vm_config.directory
        with pytest.raises(KeyError):
            vm.port_path("other")


@pytest.fixture
def standing_config(vm_config: VmConfig, image: Path, tmp_path: Path) -> Iterator[VmConfig]:
    """A machine that can be made to stand; its forks keep their identity."""
    fd = empty_memory(256)
    directory = tmp_path / "parent"
    directory.mkdir()
    memory = replace(vm_config.memory, backing=SharedMemory(fd=fd))
    disks = (Disk(id="slot", path=image),)
    yield replace(vm_config, directory=directory, memory=memory, disks=disks, accel="tcg", confinement=None)
    assert list(directory.iterdir()) == []
    os.close(fd)


@pytest.fixture
def fork_config(standing_config: VmConfig, vm_directory: Path, tmp_path: Path) -> Iterator[VmConfig]:
    """What a fork of that is, but for its parent."""
    fd = empty_memory(256)
    image = tmp_path / "fork's image"
    image.write_bytes(bytes(1024 * 1024))
    memory = replace(standing_config.memory, backing=SharedMemory(fd=fd))
    disks = (Disk(id="slot", path=image),)
    yield replace(standing_config, name="fork", directory=vm_directory, memory=memory, disks=disks)
    os.close(fd)


@pytest.fixture
def parent(any_hypervisor: Hypervisor, standing_config: VmConfig) -> Stage[Vm]:
    """A machine that stands still and that nobody holds."""

    @asynccontextmanager
    async def block() -> AsyncIterator[Vm]:
        async with any_hypervisor.running(standing_config) as vm:
            await vm.stand()
            vm.release()
        try:
            yield vm
        finally:
            await any_hypervisor.destroy(standing_config, pid=vm.pid, start_time=vm.start_time)

    return Stage(block)


async def test_a_machine_that_stands_says_how_it_is_forked(
    any_hypervisor: Hypervisor, standing_config: VmConfig
) -> None:
    async with any_hypervisor.running(standing_config) as vm:
        parent = await vm.stand()
        assert (parent.pid, parent.start_time, parent.name) == (vm.pid, vm.start_time, "test")
        assert parent.directory == standing_config.directory
        assert parent.disks == {"slot": standing_config.disks[0].path}
        assert await vm.status() == "paused"
        assert await vm.stand() == parent


async def test_forks_run_beside_each_other_and_what_they_came_from(
    any_hypervisor: Hypervisor, parent: Stage[Vm], standing_config: VmConfig, fork_config: VmConfig, image: Path
) -> None:
    async with parent as original:
        config = await forked_from(any_hypervisor, standing_config, original, fork_config)
        async with any_hypervisor.running(config) as vm:
            assert list(vm.phases) == ["forked", "monitor", "running"]
            assert vm.pid != original.pid
            assert await vm.status() == "running"
            assert not vm.devices()
            assert await vm.attach_disk(Disk(id="a", path=image, read_only=True)) == PciAddress(pci_path="01.0/00.0")
            assert (await vm.set_cpus(2)).present == 2
            kill(vm)
            assert await vm.wait() in (-signal.SIGKILL, None)
            assert str(vm.ended()).startswith("virtual machine 'fork' ")
        config = await forked_from(any_hypervisor, standing_config, original, fork_config)
        async with any_hypervisor.running(config) as vm:
            assert (await vm.cpus()).present == 1
            vm.release()
        async with any_hypervisor.adopted(replace(config, parent=None), pid=vm.pid, start_time=vm.start_time) as again:
            assert await again.status() == "running"


async def forked_from(any_hypervisor: Hypervisor, origin: VmConfig, vm: Vm, config: VmConfig) -> VmConfig:
    """`config` as that of a fork of a machine that stands, with a copy of its memory."""
    async with any_hypervisor.adopted(origin, pid=vm.pid, start_time=vm.start_time) as again:
        again.release()
        parent = await again.stand()
    assert config.memory.backing.fd is not None
    os.ftruncate(config.memory.backing.fd, 0)
    with parent.memory.open("rb") as memory:
        fill_memory(config.memory.backing.fd, memory.fileno())
    return replace(config, parent=parent)


async def test_what_cannot_be_forked_does_not_stand_and_goes_on(
    any_hypervisor: Hypervisor, standing_config: VmConfig, image: Path
) -> None:
    async with any_hypervisor.running(standing_config) as vm:
        await vm.attach_disk(Disk(id="a", path=image, read_only=True))
        with pytest.raises(ForkError, match="hot-plugged"):
            await vm.stand()
        assert await vm.status() == "running"
    memory = replace(standing_config.memory, backing=SharedMemory())
    async with any_hypervisor.running(replace(standing_config, memory=memory)) as vm:
        with pytest.raises(ForkError, match="must be a memfd of ours"):
            await vm.stand()
        assert await vm.status() == "running"


async def test_a_fork_that_is_unlike_its_parent_is_refused(
    any_hypervisor: Hypervisor, parent: Stage[Vm], standing_config: VmConfig, fork_config: VmConfig
) -> None:
    async with parent as original:
        config = await forked_from(any_hypervisor, standing_config, original, fork_config)
        for other, words in (
            (replace(config, name="longer"), "cannot be renamed"),
            (replace(config, vsock_cid=0), "what the host's kernel does"),
            (replace(config, labels=SecurityLabels(selinux="label")), "under labels"),
            (replace(config, disks=()), "other disks than it has: 'slot'"),
        ):
            with pytest.raises(ForkError, match=words):
                async with any_hypervisor.running(other):
                    pytest.fail("it was forked")
        async with any_hypervisor.running(config) as vm:
            assert await vm.status() == "running"


async def test_a_parent_that_has_ended_cannot_be_forked(
    any_hypervisor: Hypervisor, standing_config: VmConfig, fork_config: VmConfig
) -> None:
    async with any_hypervisor.running(standing_config) as vm:
        config = replace(fork_config, parent=await vm.stand())
        await vm.kill()
        with pytest.raises(ForkError, match="'test' has ended"):
            async with any_hypervisor.running(config):
                pytest.fail("it was forked")
