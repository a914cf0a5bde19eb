"""vCPUs, memory and 9p, seen from the guest; one machine with room for all of it."""

from __future__ import annotations

import os
import tempfile
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vmsandbox_hypervisor.api import Memory, NinePShare, VirtiofsShare
from vmsandbox_hypervisor.errors import DeviceError, NoSlotError
from vmsandbox_hypervisor.testing import PORT, Stage, TestGuest, booted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from vmsandbox_hypervisor.api import Hypervisor, Vm, VmConfig

    Booted = Stage[tuple[Vm, TestGuest]]

pytestmark = pytest.mark.deadline(90)

#: what a guest's kernel may keep of memory it was to give back
SPARE_MIB = 32
ONLINE = "grep -c processor /proc/cpuinfo"


@pytest.fixture(scope="module")
def vm_memory() -> Memory:
    return Memory(size_mib=256, hotplug_mib=9 * 1024, dimm_slots=2, dimm_mib=1024)


@pytest.fixture(scope="module")
def shared_directory() -> Iterator[Path]:
    """What the 9p shares export; open to everybody, because QEMU is confined."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.fixture(scope="module")
def vm_template(vm_template: VmConfig, shared_directory: Path) -> VmConfig:
    shares = (
        NinePShare(tag="later", path=shared_directory),
        NinePShare(tag="read-only", path=shared_directory, read_only=True, plugged=True),
    )
    return replace(vm_template, shares=shares)


async def total_mib(guest: TestGuest) -> int:
    return int(await guest.run("awk '/MemTotal/ { print $2 }' /proc/meminfo")) // 1024


async def test_vcpus_arrive_and_work_once_online(vm_booted: Booted) -> None:
    async with vm_booted as (vm, guest):
        assert await guest.run(ONLINE) == "1"
        await vm.set_cpus(3)
        await guest.eventually("ls -d /sys/devices/system/cpu/cpu[0-9]* | wc -l", "3")
        await guest.run("for c in 1 2; do echo 1 > /sys/devices/system/cpu/cpu$c/online; done")
        assert await guest.run(ONLINE) == "3"
        # Scaling down is the guest's part without KVM; up again needs no new vCPU.
        state = await vm.set_cpus(2)
        assert (state.present, state.surplus) == (3, 1)
        await guest.run("echo 0 > /sys/devices/system/cpu/cpu2/online")
        assert await guest.run(ONLINE) == "2"
        state = await vm.set_cpus(3)
        assert (state.present, state.surplus) == (3, 0)
        assert await guest.run("echo 1 > /sys/devices/system/cpu/cpu2/online && taskset -c 2 echo on it") == "on it"


async def test_memory_grows_by_what_was_asked_can_be_filled_and_goes_again(vm_shared: Booted) -> None:
    async with vm_shared as (vm, guest):
        before = await total_mib(guest) - (await vm.memory()).plugged_mib
        state = await vm.set_memory(256 + 202)
        assert (state.plugged_mib, state.requested_mib) == (202, 202)
        assert before + 190 < await total_mib(guest) <= before + 202
        await guest.run("mount -t tmpfs -o size=300m tmpfs /mnt && dd if=/dev/zero of=/mnt/full bs=1M count=220")
        # What is in use is not given back, and that is told.
        state = await vm.set_memory(256, timeout=0.5)
        assert state.requested_mib == 0
        assert state.plugged_mib > 50
        await guest.run("umount /mnt")
        # The request stands and the guest goes on trying; its kernel keeps a few blocks for itself.
        state = await vm.set_memory(256, timeout=5)
        assert state.plugged_mib <= SPARE_MIB
        assert await total_mib(guest) <= before + SPARE_MIB


async def test_a_small_guest_takes_eight_gib(vm_booted: Booted) -> None:
    async with vm_booted as (vm, guest):
        before = await total_mib(guest)
        assert (await vm.set_memory(256 + 8192)).plugged_mib == 8192
        assert await total_mib(guest) > before + 8000


async def test_a_guest_that_takes_no_memory_costs_nothing(hypervisor: Hypervisor, vm_config: VmConfig) -> None:
    """Its driver is not loaded yet."""
    async with hypervisor.running(vm_config) as vm:
        with pytest.raises(DeviceError, match=r"the guest did not take it within 0\.2 s"):
            await vm.set_memory(512, timeout=0.2)
        state = await vm.memory()
        assert (state.plugged_mib, state.requested_mib) == (0, 0)


async def test_a_dimm_comes_and_goes(vm_shared: Booted) -> None:
    async with vm_shared as (vm, guest):
        before = await total_mib(guest)
        await vm.attach_dimm("a", 256)
        await guest.eventually("grep -c . /sys/devices/system/memory/auto_online_blocks", "1")
        await guest.run("for m in /sys/devices/system/memory/memory*/online; do echo 1 > $m; done; true")
        assert await total_mib(guest) == before + 256
        with pytest.raises(DeviceError, match="attached already"):
            await vm.attach_dimm("a", 128)
        with pytest.raises(DeviceError, match="no room for describing"):
            await vm.attach_dimm("b", 16384)
        with pytest.raises(NoSlotError, match="256 of 1024 MiB are in use"):
            await vm.attach_dimm("b", 896)
        await vm.detach_dimm("a")
        assert await total_mib(guest) == before
        with pytest.raises(DeviceError, match="not found"):
            await vm.detach_dimm("a")


async def test_virtiofs_goes_on_while_memory_grows(vm_shared: Booted, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(1 << 20))
    async with vm_shared as (vm, guest):
        await vm.attach_virtiofs(VirtiofsShare(tag="grow", path=tmp_path))
        await guest.eventually("mount -t virtiofs grow /mnt && echo mounted", "mounted")
        await vm.set_memory(512)
        await vm.attach_dimm("g", 128)
        await guest.run("cp /mnt/file /mnt/copy; umount /mnt")
        assert (tmp_path / "copy").read_bytes() == (tmp_path / "file").read_bytes()
        await vm.detach_virtiofs("grow")
        await vm.detach_dimm("g")
        await vm.set_memory(256, timeout=2)


MOUNT_9P = "mount -t 9p -o trans=virtio,version=9p2000.L"


async def test_a_9p_share_is_attached_written_and_detached(vm_shared: Booted, shared_directory: Path) -> None:
    (shared_directory / "from-host").write_text("hello")
    later = NinePShare(tag="later", path=shared_directory)
    async with vm_shared as (vm, guest):
        for _ in range(2):
            await vm.attach_9p(later)
            assert set(vm.devices()) == {"ninep-later"}
            await guest.eventually(f"{MOUNT_9P} later /mnt && cat /mnt/from-host", "hello")
            await guest.run("echo back > /mnt/from-guest; umount /mnt")
            assert (shared_directory / "from-guest").read_text() == "back\n"
            await vm.detach_9p("later")
            assert vm.devices() == {}


async def test_a_read_only_9p_share_is_read_only_on_the_host_s_side(vm_shared: Booted, shared_directory: Path) -> None:
    (shared_directory / "precious").write_text("as it was")
    async with vm_shared as (_, guest):
        await guest.run(f"{MOUNT_9P} read-only /mnt")
        assert await guest.run("cat /mnt/precious") == "as it was"
        answer = await guest.answer("echo changed > /mnt/precious")
        assert answer.status != 0
        await guest.run("umount /mnt")
        assert (shared_directory / "precious").read_text() == "as it was"


async def test_all_sixteen_root_ports_take_a_device(vm_shared: Booted, tmp_path: Path) -> None:
    from vmsandbox_hypervisor.api import Disk

    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    async with vm_shared as (vm, guest):
        paths = {
            (await vm.attach_disk(Disk(id=f"d{number}", path=image, read_only=True))).pci_path for number in range(16)
        }
        assert len(paths) == 16
        await guest.eventually("ls /sys/block | wc -l", "16")
        with pytest.raises(NoSlotError, match="all 16 root ports"):
            await vm.attach_disk(Disk(id="d16", path=image, read_only=True))
        for number in range(16):
            await vm.detach_disk(f"d{number}")
        assert await guest.run("ls /sys/block | wc -l") == "0"


@asynccontextmanager
async def adopted_guest(hypervisor: Hypervisor, config: VmConfig, vm: Vm) -> AsyncIterator[tuple[Vm, TestGuest]]:
    async with hypervisor.adopted(config, pid=vm.pid, start_time=vm.start_time) as again:
        yield again, TestGuest(again.port_path(PORT))


async def test_what_was_resized_is_known_after_an_adoption(hypervisor: Hypervisor, vm_config: VmConfig) -> None:
    async with booted(hypervisor.running(vm_config)) as (vm, _):
        await vm.set_cpus(2)
        await vm.set_memory(384)
        await vm.attach_dimm("d", 128)
        vm.release()
    async with adopted_guest(hypervisor, vm_config, vm) as (again, guest):
        assert (await again.cpus()).present == 2
        assert (await again.memory()).plugged_mib == 128 + 128
        await again.set_cpus(3)
        await guest.eventually("ls -d /sys/devices/system/cpu/cpu[0-9]* | wc -l", "3")
        await again.detach_dimm("d")
        assert (await again.set_memory(256, timeout=5)).plugged_mib <= SPARE_MIB
