"""Machines that are forked from one that stands still, with real guests."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import tempfile
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.harness.netns import namespace
from tests.harness.taps import opened_tap
from vmsandbox_hypervisor.api import (
    Confinement,
    Disk,
    Memory,
    Nic,
    PrivateMemory,
    SecurityLabels,
    SharedMemory,
    VirtiofsShare,
)
from vmsandbox_hypervisor.children import Child
from vmsandbox_hypervisor.errors import BootError, DeviceError, ForkError
from vmsandbox_hypervisor.qemu.hotplug_cpu import vcpu_threads
from vmsandbox_hypervisor.qemu.machine import QemuHypervisor
from vmsandbox_hypervisor.qemu.template import copied_memory, empty_memory, save_template
from vmsandbox_hypervisor.testing import TestGuest, booted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmsandbox_hypervisor.api import Hypervisor, Parent, Vm, VmConfig

pytestmark = pytest.mark.deadline(120)

SIZE = 256
NOBODY = Confinement(uid=65534, gid=65534)


class Standing(NamedTuple):
    """A machine that stands still, how it is configured, and its template's memory."""

    parent: Parent
    config: VmConfig
    memory: int


@pytest.fixture(scope="module")
def vm_memory() -> Memory:
    return Memory(size_mib=SIZE, hotplug_mib=512)


@pytest.fixture(scope="module")
def vm_confinement() -> None:
    """Root, who may give forks an identity."""
    return


def digest(fd: int) -> str:
    """Of everything in a memfd, holes read as zeros."""
    found = hashlib.sha256()
    for offset in range(0, os.fstat(fd).st_size, 1 << 22):
        found.update(os.pread(fd, 1 << 22, offset))
    return found.hexdigest()


def seen_by(parent: Parent) -> str:
    """Of the guest's memory as a machine has it mapped, whether or not it shares that."""
    found = hashlib.sha256()
    with open(f"/proc/{parent.pid}/maps") as maps, open(f"/proc/{parent.pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            if "/memfd:guest memory" in line:
                start, end = (int(address, 16) for address in line.split()[0].split("-"))
                for offset in range(start, end, 1 << 22):
                    found.update(os.pread(memory.fileno(), min(1 << 22, end - offset), offset))
    return found.hexdigest()


async def stood(hypervisor: Hypervisor, config: VmConfig, prepare: str) -> Parent:
    """Start a machine, have its guest do something, and leave it standing still."""
    async with booted(hypervisor.running(config)) as (vm, guest):
        await guest.run(prepare)
        parent = await vm.stand()
        assert await vm.status() == "paused"
        vm.release()
    return parent


@pytest.fixture(scope="module", params=["private", "shared"])
def standing(request: pytest.FixtureRequest, hypervisor: Hypervisor, vm_template: VmConfig) -> Iterator[Standing]:
    """One parent for the module: a template's clone, with a mark in its guest's memory."""
    with tempfile.TemporaryDirectory(prefix="vm-") as name:
        places = {part: Path(name, part) for part in ("origin", "parent")}
        for place in places.values():
            place.mkdir()
        image = Path(name, "image")
        image.write_bytes(b"of the parent".ljust(1 << 20))
        disk = Disk(id="slot", path=image)
        memory = empty_memory(SIZE)
        base = replace(vm_template.memory, backing=SharedMemory(fd=memory))
        origin = replace(vm_template, accel="tcg", directory=places["origin"], memory=base, disks=(disk,))

        async def made() -> tuple[VmConfig, Parent]:
            async with booted(hypervisor.running(origin)) as (vm, guest):
                await guest.run("echo from the template > /tmp/mark")
                template = await save_template(vm, places["origin"])
            backing = PrivateMemory(fd=memory)
            if request.param == "shared":
                backing = SharedMemory(fd=copied_memory(memory))  # type: ignore[assignment]
            config = replace(
                origin,
                directory=places["parent"],
                memory=replace(base, backing=backing),
                restore=template.state,
            )
            return config, await stood(hypervisor, config, "echo from the parent >> /tmp/mark")

        config, parent = asyncio.run(made())
        try:
            yield Standing(parent, config, memory)
        finally:
            asyncio.run(hypervisor.destroy(config, pid=parent.pid, start_time=parent.start_time))
            os.close(memory)
            if config.memory.backing.fd != memory:
                assert config.memory.backing.fd is not None
                os.close(config.memory.backing.fd)


@pytest.fixture
def fork_config(standing: Standing, vm_directory: Path, tmp_path: Path) -> Iterator[Callable[[int], VmConfig]]:
    """What makes configurations of forks: each has a directory, a disk and, where that is shared, memory of its own."""
    made: list[int] = []

    def make(number: int) -> VmConfig:
        directory = vm_directory / str(number)
        directory.mkdir()
        image = tmp_path / f"image-{number}"
        image.write_bytes(f"of fork {number}".encode().ljust(1 << 20))
        backing = standing.config.memory.backing
        if isinstance(backing, SharedMemory):
            with standing.parent.memory.open("rb") as memory:
                made.append(copied_memory(memory.fileno()))
            backing = SharedMemory(fd=made[-1])
        else:
            backing = PrivateMemory(fd=-1)
        return replace(
            standing.config,
            name=f"tes{number}",
            directory=directory,
            memory=replace(standing.config.memory, backing=backing),
            disks=(Disk(id="slot", path=image),),
            confinement=NOBODY,
            parent=standing.parent,
        )

    yield make
    for fd in made:
        os.close(fd)
    for directory in vm_directory.iterdir():
        directory.rmdir()


async def test_forks_made_at_once_go_on_where_the_parent_stands_each_by_itself(
    hypervisor: Hypervisor, standing: Standing, fork_config: Callable[[int], VmConfig]
) -> None:
    async with AsyncExitStack() as stack:

        async def one(number: int) -> tuple[Vm, TestGuest]:
            return await stack.enter_async_context(booted(hypervisor.running(fork_config(number))))

        made = await asyncio.gather(*(one(number) for number in range(3)))
        for vm, guest in made:
            assert list(vm.phases) == ["forked", "monitor", "running"]
            assert await vm.status() == "running"
            assert await guest.run("cat /tmp/mark") == "from the template\nfrom the parent"
        await asyncio.gather(*(guest.run(f"echo {n} > /tmp/mark") for n, (_, guest) in enumerate(made)))
        assert await asyncio.gather(*(guest.run("cat /tmp/mark") for _, guest in made)) == ["0", "1", "2"]
        for number, (vm, guest) in enumerate(made):
            assert await guest.run("head -c 9 /dev/vda") == f"of fork {number}"
            assert f"guest=tes{number},".encode() in Path(f"/proc/{vm.pid}/cmdline").read_bytes()
        assert len({vm.pid for vm, _ in made} | {standing.parent.pid}) == 4


async def test_everything_can_be_plugged_into_a_fork(
    hypervisor: Hypervisor, fork_config: Callable[[int], VmConfig], tap: int, tmp_path: Path
) -> None:
    image = tmp_path / "late"
    image.write_bytes(b"plugged into a fork".ljust(4096))
    (tmp_path / "file").write_text("shared")
    config = fork_config(0)
    async with booted(hypervisor.running(config)) as (vm, guest):
        await vm.attach_disk(Disk(id="late", path=image, read_only=True))
        await guest.eventually("head -c 19 /dev/vdb", "plugged into a fork")
        await vm.detach_disk("late")
        await vm.attach_nic(Nic(id="late", tap_fd=tap, mac="02:00:00:00:00:07", mtu=0))
        await guest.eventually("cat /sys/class/net/eth0/address", "02:00:00:00:00:07")
        await vm.detach_nic("late")
        await vm.set_cpus(2)
        await guest.eventually("ls -d /sys/devices/system/cpu/cpu[0-9]* | wc -l", "2")
        await guest.run("echo 1 > /sys/devices/system/cpu/cpu1/online; taskset -c 1 true")
        before = int(await guest.run("awk '/MemTotal/ { print $2 }' /proc/meminfo"))
        assert (await vm.set_memory(SIZE + 200)).plugged_mib == 200
        after = int(await guest.run("awk '/MemTotal/ { print $2 }' /proc/meminfo"))
        assert after - before > 190 * 1024
        await guest.run("mount -t tmpfs -o size=200m tmpfs /mnt && dd if=/dev/zero of=/mnt/full bs=1M count=180")
        await guest.run("umount /mnt")
        share = VirtiofsShare(tag="share", path=tmp_path)
        if isinstance(config.memory.backing, SharedMemory):
            await vm.attach_virtiofs(share)
            await guest.eventually("mount -t virtiofs share /mnt && cat /mnt/file", "shared")
            await guest.run("umount /mnt")
            await vm.detach_virtiofs("share")
        else:
            with pytest.raises(DeviceError, match="mapped shared"):
                await vm.attach_virtiofs(share)


async def test_a_disk_of_the_start_can_be_replaced_in_a_fork_and_is_locked(
    hypervisor: Hypervisor, fork_config: Callable[[int], VmConfig], vm_template: VmConfig, tmp_path: Path
) -> None:
    config = fork_config(0)
    other = tmp_path / "other"
    other.write_bytes(b"replaced".ljust(1 << 20))
    async with booted(hypervisor.running(config)) as (vm, guest):
        rival = replace(vm_template, directory=tmp_path, disks=config.disks, memory=Memory(size_mib=SIZE))
        with pytest.raises(BootError, match="another process using the image"):
            async with hypervisor.running(rival):
                pytest.fail("two write to one disk")
        await vm.replace_disk(Disk(id="slot", path=other))
        await guest.eventually("head -c 8 /dev/vda", "replaced")
        await guest.run("echo written | dd of=/dev/vda conv=fsync")
    assert other.read_bytes().startswith(b"written")
    assert config.disks[0].path.read_bytes().startswith(b"of fork 0")


async def test_a_fork_that_writes_everywhere_changes_nothing_for_parent_and_template(
    hypervisor: Hypervisor, standing: Standing, fork_config: Callable[[int], VmConfig]
) -> None:
    template, parent = digest(standing.memory), seen_by(standing.parent)
    disk = standing.parent.disks["slot"].read_bytes()
    async with booted(hypervisor.running(fork_config(0))) as (_, guest):
        await guest.run("echo changed > /tmp/mark; dd if=/dev/urandom of=/tmp/filled bs=1M count=120; rm /tmp/filled")
        await guest.run("dd if=/dev/zero of=/tmp/filled bs=1M count=120; rm /tmp/filled")
        await guest.run("dd if=/dev/zero of=/dev/vda bs=1M count=1 conv=fsync")
    assert digest(standing.memory) == template
    assert seen_by(standing.parent) == parent
    assert standing.parent.disks["slot"].read_bytes() == disk
    async with booted(hypervisor.running(fork_config(1))) as (_, guest):
        assert await guest.run("cat /tmp/mark") == "from the template\nfrom the parent"


async def test_a_fork_runs_without_any_privilege_and_filtered(
    hypervisor: Hypervisor, fork_config: Callable[[int], VmConfig]
) -> None:
    async with hypervisor.running(fork_config(0)) as vm:
        for thread in Path(f"/proc/{vm.pid}/task").iterdir():
            lines = (thread / "status").read_text().splitlines()
            status = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
            assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"65534"}
            assert status["Groups"] == ""
            assert (status["NoNewPrivs"], status["Seccomp"], status["TracerPid"]) == ("1", "2", "0")
            assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")} == {0}


async def test_console_and_evidence_are_a_fork_s_own(
    hypervisor: Hypervisor, standing: Standing, fork_config: Callable[[int], VmConfig]
) -> None:
    async with AsyncExitStack() as stack:
        made = [await stack.enter_async_context(booted(hypervisor.running(fork_config(n)))) for n in range(2)]
        for number, (_, guest) in enumerate(made):
            await guest.run(f"echo printed by {number} > /dev/console")
        for number, (vm, guest) in enumerate(made):
            # It may be on its way still.
            for _ in range(50):
                if f"printed by {number}" in vm.console():
                    break
                await guest.run("usleep 20000")
            assert f"printed by {number}" in vm.console()
            assert f"printed by {1 - number}" not in vm.console()
            assert "forked" in vm.evidence()
            assert f"printed by {number}" in vm.evidence()
        vm, _ = made[0]
        os.kill(vm.pid, signal.SIGKILL)
        assert await vm.wait() in (-signal.SIGKILL, None)
        ended = vm.ended()
        assert ended is not None
        assert "printed by 0" in ended.evidence
        assert await made[1][0].status() == "running"
    assert not list(standing.parent.directory.glob("*.log.new"))


async def test_a_fork_can_be_released_and_adopted(
    hypervisor: Hypervisor, fork_config: Callable[[int], VmConfig]
) -> None:
    config = fork_config(0)
    async with booted(hypervisor.running(config)) as (vm, guest):
        await guest.run("echo mine > /tmp/mark")
        vm.release()
    config = replace(config, parent=None)
    async with booted(hypervisor.adopted(config, pid=vm.pid, start_time=vm.start_time)) as (again, guest):
        assert await again.status() == "running"
        assert await guest.run("cat /tmp/mark") == "mine"
        await again.set_cpus(2)


async def test_vcpus_of_a_fork_are_bound_and_nobody_else_s(
    hypervisor: Hypervisor, standing: Standing, fork_config: Callable[[int], VmConfig]
) -> None:
    everywhere = os.sched_getaffinity(0)
    one = {min(everywhere)}
    async with hypervisor.running(fork_config(0)) as vm:
        await vm.bind_cpus(one)
        bound = vcpu_threads(vm.pid)
        assert len(bound) == 1
        for thread in map(int, os.listdir(f"/proc/{vm.pid}/task")):
            assert os.sched_getaffinity(thread) == (one if thread in bound else everywhere)
    for thread in map(int, os.listdir(f"/proc/{standing.parent.pid}/task")):
        assert os.sched_getaffinity(thread) == everywhere


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "longer"}, "cannot be renamed to 'longer'"),
        ({"disks": (Disk(id="slot", path=Path("/nonexistent/disk")),)}, "cannot open disk"),
        ({"vsock_cid": 0}, "what the host's kernel does"),
        ({"labels": SecurityLabels(apparmor="profile")}, "under labels"),
        ({"disks": (Disk(id="other", path=Path("/dev/null")),)}, "other disks than it has: 'other'"),
    ],
)
async def test_a_fork_that_cannot_be_leaves_nothing_and_the_parent_stands(
    hypervisor: Hypervisor, standing: Standing, fork_config: Callable[[int], VmConfig], change: object, words: str
) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    config = fork_config(0)
    with pytest.raises(ForkError, match=words):
        async with hypervisor.running(replace(config, **change)):  # type: ignore[arg-type]
            pytest.fail("it was forked")
    assert list(config.directory.iterdir()) == []
    made = isinstance(config.memory.backing, SharedMemory)
    assert len(os.listdir("/proc/self/fd")) == len(before) + made
    async with booted(hypervisor.running(fork_config(1))) as (_, guest):
        assert await guest.run("cat /tmp/mark") == "from the template\nfrom the parent"
    assert Path(f"/proc/{standing.parent.pid}").exists()


async def test_a_parent_that_somebody_is_connected_to_cannot_be_forked(
    hypervisor: Hypervisor, standing: Standing, fork_config: Callable[[int], VmConfig]
) -> None:
    pid, start_time = standing.parent.pid, standing.parent.start_time
    async with hypervisor.adopted(standing.config, pid=pid, start_time=start_time) as vm:
        vm.release()
        with pytest.raises(ForkError, match="cannot be shared: socket"):
            async with hypervisor.running(fork_config(0)):
                pytest.fail("it was forked")


async def test_a_fork_is_settled_before_it_runs(standing: Standing, fork_config: Callable[[int], VmConfig]) -> None:
    settled = []
    async with QemuHypervisor(settle=settled.append).running(fork_config(0)) as vm:
        assert settled == [vm.pid]


# ---------------------------------------------------------------- a parent of one's own


@pytest.fixture
def candidate(vm_template: VmConfig) -> Iterator[VmConfig]:
    """A machine that can be made to stand without any template."""
    with tempfile.TemporaryDirectory(prefix="vm-") as name:
        fd = empty_memory(SIZE)
        memory = replace(vm_template.memory, backing=SharedMemory(fd=fd))
        yield replace(vm_template, accel="tcg", directory=Path(name), memory=memory)
        os.close(fd)


async def test_forks_outlive_a_parent_that_is_killed_and_others_are_refused(
    hypervisor: Hypervisor, candidate: VmConfig, vm_directory: Path
) -> None:
    parent = await stood(hypervisor, candidate, "echo from the parent > /tmp/mark")
    child = Child.adopted("parent", parent.pid, parent.start_time)
    with parent.memory.open("rb") as file:
        own = copied_memory(file.fileno())
    try:
        memory = replace(candidate.memory, backing=SharedMemory(fd=own))
        # Without any template that it comes from.
        config = replace(candidate, directory=vm_directory, memory=memory, parent=parent, confinement=NOBODY)
        async with booted(hypervisor.running(config)) as (vm, guest):
            os.kill(parent.pid, signal.SIGKILL)
            await child.wait()
            assert await guest.run("cat /tmp/mark") == "from the parent"
            assert await vm.status() == "running"
            await vm.set_cpus(2)
            await guest.eventually("ls -d /sys/devices/system/cpu/cpu[0-9]* | wc -l", "2")
        with pytest.raises(ForkError, match="'test' has ended"):
            async with hypervisor.running(config):
                pytest.fail("forked from nobody")
        assert list(vm_directory.iterdir()) == []
    finally:
        os.close(own)
        await hypervisor.destroy(candidate, pid=parent.pid, start_time=parent.start_time)


async def test_a_network_card_of_the_start_goes_on_with_a_fork_s_own_tap(
    hypervisor: Hypervisor, candidate: VmConfig, vm_directory: Path
) -> None:
    with namespace("vmtest-origin") as origin, namespace("vmtest-other") as other:
        taps = [space.within(lambda: opened_tap("card")) for space in (origin, other)]
        other.run("ip link set card up", "ip addr add 10.9.0.1/24 dev card")
        nic = Nic(id="first", tap_fd=taps[0], mac="02:00:00:00:00:01", mtu=0)
        candidate = replace(candidate, nics=(nic,))
        parent = await stood(hypervisor, candidate, "ip link set eth0 up; ip addr add 10.9.0.2/24 dev eth0")
        with parent.memory.open("rb") as file:
            own = copied_memory(file.fileno())
        memory = replace(candidate.memory, backing=SharedMemory(fd=own))
        fork = replace(
            candidate, directory=vm_directory, memory=memory, parent=parent, nics=(replace(nic, tap_fd=taps[1]),)
        )
        try:
            async with booted(hypervisor.running(fork)) as (vm, guest):
                assert set(vm.devices()) == {"nic-first"}
                assert "1 packets received" in await guest.run("ping -c 1 -W 10 10.9.0.1")
                await vm.detach_nic("first")
        finally:
            await hypervisor.destroy(candidate, pid=parent.pid, start_time=parent.start_time)
            for fd in (own, *taps):
                os.close(fd)


async def test_a_machine_that_cannot_stand_goes_on(hypervisor: Hypervisor, candidate: VmConfig, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    async with hypervisor.running(candidate) as vm:
        await vm.attach_disk(Disk(id="late", path=image, read_only=True))
        with pytest.raises(ForkError, match="hot-plugged"):
            await vm.stand()
        assert await vm.status() == "running"
