"""Templates and their clones, with real machines."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import signal
import tempfile
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.harness.netns import namespace
from tests.harness.taps import opened_tap
from vmsandbox_hypervisor.api import Disk, Memory, Nic, PrivateMemory, SharedMemory, VirtiofsShare
from vmsandbox_hypervisor.errors import BootError, DeviceError, ExitedError, HypervisorError
from vmsandbox_hypervisor.qemu.template import Template, copied_memory, empty_memory, fill_memory, save_template
from vmsandbox_hypervisor.testing import booted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmsandbox_hypervisor.api import Hypervisor, VmConfig

pytestmark = pytest.mark.deadline(90)

SIZE = 256


class Saved(NamedTuple):
    template: Template
    memory: int
    config: VmConfig


def digest(fd: int) -> str:
    """Of everything in a memfd, holes read as zeros."""
    found = hashlib.sha256()
    for offset in range(0, os.fstat(fd).st_size, 1 << 22):
        found.update(os.pread(fd, 1 << 22, offset))
    return found.hexdigest()


@pytest.fixture(scope="module")
def vm_memory() -> Memory:
    return Memory(size_mib=SIZE, hotplug_mib=1024)


@pytest.fixture(scope="module")
def saved(hypervisor: Hypervisor, vm_template: VmConfig) -> Iterator[Saved]:
    """One template for the module, with a file in the guest's memory as its mark."""
    directory = Path(tempfile.mkdtemp(prefix="vm-"))
    memory = empty_memory(SIZE)
    config = replace(
        vm_template, directory=directory, memory=replace(vm_template.memory, backing=SharedMemory(fd=memory))
    )

    async def make() -> Template:
        async with booted(hypervisor.running(config)) as (vm, guest):
            await guest.run("echo from the template > /tmp/mark")
            return await save_template(vm, directory)

    yield Saved(asyncio.run(make()), memory, config)
    os.close(memory)
    shutil.rmtree(directory)


@pytest.fixture
def private(saved: Saved, vm_directory: Path) -> VmConfig:
    memory = replace(saved.config.memory, backing=PrivateMemory(fd=saved.memory))
    return replace(saved.config, directory=vm_directory, memory=memory, restore=saved.template.state)


@pytest.fixture
def shareable(saved: Saved, vm_directory: Path) -> Iterator[VmConfig]:
    fd = copied_memory(saved.memory)
    memory = replace(saved.config.memory, backing=SharedMemory(fd=fd))
    yield replace(saved.config, directory=vm_directory, memory=memory, restore=saved.template.state)
    os.close(fd)


@pytest.fixture(params=["private", "shareable"])
def clone(request: pytest.FixtureRequest) -> VmConfig:
    config: VmConfig = request.getfixturevalue(request.param)
    return config


def test_a_template_is_for_root_only_and_sparse(saved: Saved) -> None:
    for path in (saved.template.state, saved.template.memory):
        assert path.stat().st_mode & 0o777 == 0o600
    assert saved.template.memory.stat().st_size == SIZE << 20
    assert saved.template.memory.stat().st_blocks * 512 < 150 << 20
    assert 10_000 < saved.template.state.stat().st_size < 4 << 20


def test_nobody_can_change_a_template_s_memory(saved: Saved) -> None:
    with pytest.raises(PermissionError):
        os.pwrite(saved.memory, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(saved.memory, 0)


def test_memory_comes_back_from_its_file_as_it_was(saved: Saved) -> None:
    again = Template.found(saved.template.state.parent, size_mib=SIZE).loaded()
    copy = copied_memory(saved.memory)
    try:
        assert digest(again) == digest(copy) == digest(saved.memory)
        with pytest.raises(PermissionError):
            os.pwrite(again, b"x", 0)
        assert os.pwrite(copy, b"x", 0) == 1
        # The holes are left out, but for the file system's own blocks.
        assert os.fstat(again).st_blocks < os.fstat(saved.memory).st_blocks + 2048
    finally:
        os.close(again)
        os.close(copy)


async def test_a_clone_goes_on_where_the_template_was(hypervisor: Hypervisor, clone: VmConfig) -> None:
    async with booted(hypervisor.running(clone)) as (vm, guest):
        assert await guest.run("cat /tmp/mark") == "from the template"
        assert list(vm.phases) == ["spawned", "monitor", "restored", "running"]
        assert await vm.status() == "running"


async def test_a_clone_s_memory_may_be_filled_while_qemu_starts(
    hypervisor: Hypervisor, saved: Saved, shareable: VmConfig
) -> None:
    fd = empty_memory(SIZE)
    filled = asyncio.ensure_future(asyncio.to_thread(fill_memory, fd, saved.memory))
    try:
        clone = replace(shareable, memory=replace(shareable.memory, backing=SharedMemory(fd=fd, filled=filled)))
        async with booted(hypervisor.running(clone)) as (_, guest):
            assert await guest.run("cat /tmp/mark") == "from the template"
    finally:
        await filled
        os.close(fd)


async def test_memory_that_cannot_be_filled_is_a_failed_boot(hypervisor: Hypervisor, shareable: VmConfig) -> None:
    filled = asyncio.get_running_loop().create_future()
    filled.set_exception(OSError(errno.ENOMEM, "no room for the guest's memory"))
    backing = SharedMemory(fd=shareable.memory.backing.fd, filled=filled)
    with pytest.raises(BootError, match="no room for the guest's memory") as caught:
        async with hypervisor.running(replace(shareable, memory=replace(shareable.memory, backing=backing))):
            pytest.fail("a machine without its memory")
    assert caught.value.phase == "monitor"


async def test_everything_can_be_plugged_into_a_clone(hypervisor: Hypervisor, clone: VmConfig, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"plugged into a clone".ljust(4096))
    async with booted(hypervisor.running(clone)) as (vm, guest):
        await vm.attach_disk(Disk(id="late", path=image, read_only=True))
        await guest.eventually("head -c 20 /dev/vda", "plugged into a clone")
        await vm.detach_disk("late")
        assert await guest.run("ls /sys/block") == ""
        await vm.set_cpus(2)
        await guest.eventually("ls -d /sys/devices/system/cpu/cpu[0-9]* | wc -l", "2")
        await guest.run("echo 1 > /sys/devices/system/cpu/cpu1/online; taskset -c 1 true")
        before = int(await guest.run("awk '/MemTotal/ { print $2 }' /proc/meminfo"))
        assert (await vm.set_memory(SIZE + 300)).plugged_mib == 300
        after = int(await guest.run("awk '/MemTotal/ { print $2 }' /proc/meminfo"))
        assert after - before > 290 * 1024
        await guest.run("mount -t tmpfs -o size=300m tmpfs /mnt && dd if=/dev/zero of=/mnt/full bs=1M count=250")


async def test_only_a_shareable_clone_takes_shares(
    hypervisor: Hypervisor, shareable: VmConfig, private: VmConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("shared")
    share = VirtiofsShare(tag="share", path=tmp_path)
    async with booted(hypervisor.running(shareable)) as (vm, guest):
        await vm.attach_virtiofs(share)
        await guest.eventually("mount -t virtiofs share /mnt && cat /mnt/file", "shared")
        await guest.run("umount /mnt")
        await vm.detach_virtiofs("share")
    async with hypervisor.running(private) as vm:
        with pytest.raises(DeviceError, match="mapped shared"):
            await vm.attach_virtiofs(share)


async def test_a_clone_that_writes_and_frees_everywhere_changes_nothing_for_the_next(
    hypervisor: Hypervisor, saved: Saved, private: VmConfig
) -> None:
    before = digest(saved.memory)
    async with booted(hypervisor.running(private)) as (_, guest):
        await guest.run("echo changed > /tmp/mark; dd if=/dev/urandom of=/tmp/filled bs=1M count=60; rm /tmp/filled")
        await guest.run(
            "dd if=/dev/zero of=/tmp/filled bs=1M count=100; rm /tmp/filled; echo 3 > /proc/sys/vm/drop_caches"
        )
    assert digest(saved.memory) == before
    async with booted(hypervisor.running(private)) as (_, guest):
        assert await guest.run("cat /tmp/mark") == "from the template"


async def test_clones_at_once_share_memory_and_not_their_changes(hypervisor: Hypervisor, private: VmConfig) -> None:
    async with AsyncExitStack() as stack:
        guests = []
        for number in range(3):
            directory = private.directory / str(number)
            directory.mkdir()
            stack.callback(directory.rmdir)
            config = replace(private, name=f"clone-{number}", directory=directory)
            _, guest = await stack.enter_async_context(booted(hypervisor.running(config)))
            guests.append(guest)
        await asyncio.gather(*(guest.run(f"echo {n} > /tmp/mark") for n, guest in enumerate(guests)))
        marks = await asyncio.gather(*(guest.run("cat /tmp/mark") for guest in guests))
        assert marks == ["0", "1", "2"]


async def test_a_clone_can_be_adopted(hypervisor: Hypervisor, private: VmConfig) -> None:
    async with booted(hypervisor.running(private)) as (vm, _):
        vm.release()
    async with hypervisor.adopted(private, pid=vm.pid, start_time=vm.start_time) as again:
        assert await again.status() == "running"


async def test_a_network_card_goes_on_with_another_tap_and_all_offloads(
    hypervisor: Hypervisor, vm_template: VmConfig, vm_directory: Path, tmp_path: Path
) -> None:
    memory = empty_memory(SIZE)
    with namespace("vmtest-origin") as origin, namespace("vmtest-other") as other:
        taps = [space.within(lambda: opened_tap("card")) for space in (origin, other)]
        other.run("ip link set card up", "ip addr add 10.9.0.1/24 dev card")
        nic = Nic(id="first", tap_fd=taps[0], mac="02:00:00:00:00:01", mtu=0)
        backing = SharedMemory(fd=memory)
        config = replace(
            vm_template, directory=vm_directory, memory=Memory(size_mib=SIZE, backing=backing), nics=(nic,)
        )
        async with booted(hypervisor.running(config)) as (vm, guest):
            assert await guest.run("ls /sys/class/net") == "eth0\nlo"
            offered = await guest.run(FEATURES)
            template = await save_template(vm, tmp_path)
        clone = replace(
            config,
            memory=replace(config.memory, backing=PrivateMemory(fd=memory)),
            nics=(replace(nic, tap_fd=taps[1]),),
            restore=template.state,
        )
        async with booted(hypervisor.running(clone)) as (vm, guest):
            assert set(vm.devices()) == {"nic-first"}
            features = await guest.run(FEATURES)
            assert features == offered
            # Checksums and segmentation (TCP over IPv4 and IPv6) in both directions.
            assert [features[bit] for bit in (0, 1, 7, 8, 11, 12)] == ["1"] * 6
            await guest.run(
                "ip link set eth0 address 02:00:00:00:00:07; ip link set eth0 up; ip addr add 10.9.0.2/24 dev eth0"
            )
            assert "1 packets received" in await guest.run("ping -c 1 -W 10 10.9.0.1")
            assert "10.9.0.2 dev card lladdr 02:00:00:00:00:07" in other.run("ip neigh")
    for fd in (memory, *taps):
        os.close(fd)


FEATURES = "cat /sys/bus/virtio/drivers/virtio_net/virtio*/features"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b""), "cannot start virtual machine"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "cannot start virtual machine"),
        (lambda path: path.write_bytes(b"QEVM rubbish" * 1000), "cannot start virtual machine"),
    ],
    ids=["missing", "empty", "cut off", "rubbish"],
)
async def test_a_damaged_state_is_a_boot_error_and_leaves_nothing(
    hypervisor: Hypervisor, private: VmConfig, tmp_path: Path, damage: object, words: str
) -> None:
    assert private.restore is not None
    state = tmp_path / "state"
    shutil.copy(private.restore, state)
    damage(state)  # type: ignore[operator]
    with pytest.raises(BootError, match=words) as caught:
        async with hypervisor.running(replace(private, restore=state)):
            pytest.fail("it started")
    assert caught.value.phase in ("prepared", "monitor")
    assert "\n" not in str(caught.value)


def test_a_template_that_is_not_whole_is_told_from_one_that_is(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(HypervisorError, match="no template"):
        Template.found(tmp_path, size_mib=SIZE)
    (tmp_path / "state").write_bytes(b"x")
    (tmp_path / "memory").write_bytes(b"x")
    with pytest.raises(HypervisorError, match="not whole"):
        Template.found(tmp_path, size_mib=SIZE)
    with pytest.raises(HypervisorError, match="not whole"):
        Template.found(saved.template.state.parent, size_mib=SIZE + 1)


@pytest.fixture
def candidate(vm_config: VmConfig) -> Iterator[VmConfig]:
    """A machine that could become a template."""
    fd = empty_memory(SIZE)
    yield replace(vm_config, memory=replace(vm_config.memory, backing=SharedMemory(fd=fd)))
    os.close(fd)


async def test_a_machine_that_was_changed_does_not_become_a_template(
    hypervisor: Hypervisor, candidate: VmConfig, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    out = tmp_path / "out"
    out.mkdir()
    async with hypervisor.running(candidate) as vm:
        await vm.attach_disk(Disk(id="d", path=image))
        with pytest.raises(HypervisorError, match="hot-plugged"):
            await save_template(vm, out)
        assert await vm.status() == "running"
    async with hypervisor.running(replace(candidate, memory=Memory(size_mib=SIZE))) as vm:
        with pytest.raises(HypervisorError, match="memfd"):
            await save_template(vm, out)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("milliseconds", [0, 2, 5, 10, 20])
async def test_qemu_s_death_while_it_is_saved_leaves_no_template(
    hypervisor: Hypervisor, candidate: VmConfig, tmp_path: Path, milliseconds: int
) -> None:
    async with hypervisor.running(candidate) as vm:
        saving = asyncio.create_task(save_template(vm, tmp_path))
        await asyncio.wait({saving}, timeout=milliseconds / 1000)
        if saving.done():
            assert Template.found(tmp_path, size_mib=SIZE) == saving.result()
            return
        with suppress(ProcessLookupError):  # it was about to be ended anyway
            os.kill(vm.pid, signal.SIGKILL)
        try:
            await saving
        except ExitedError:
            assert list(tmp_path.iterdir()) == []
        else:
            # It was saved already and about to be ended anyway.
            assert Template.found(tmp_path, size_mib=SIZE) == saving.result()


async def test_a_full_disk_while_saving_is_an_error_and_leaves_nothing(
    hypervisor: Hypervisor, candidate: VmConfig, tiny_disk: Path
) -> None:
    async with hypervisor.running(candidate) as vm:
        with pytest.raises((HypervisorError, OSError)) as caught:
            await save_template(vm, tiny_disk)
        if isinstance(caught.value, OSError):
            assert caught.value.errno == errno.ENOSPC
    assert list(tiny_disk.iterdir()) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    import subprocess

    path = tmp_path / "tiny"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


async def test_free_pages_go_back_to_the_host(hypervisor: Hypervisor, candidate: VmConfig) -> None:
    memory = replace(candidate.memory, free_page_reporting=True)
    assert isinstance(memory.backing, SharedMemory)
    assert memory.backing.fd is not None
    fd = memory.backing.fd

    def used_mib() -> int:
        return os.fstat(fd).st_blocks * 512 >> 20

    async with booted(hypervisor.running(replace(candidate, memory=memory))) as (_, guest):
        await guest.run("mount -t tmpfs -o size=150m tmpfs /mnt && dd if=/dev/urandom of=/mnt/full bs=1M count=120")
        filled = used_mib()
        await guest.run("umount /mnt")
        # The guest reports every two seconds; its shell is a clock that needs no sleep here.
        for _ in range(20):
            if used_mib() < filled - 80:
                break
            await guest.run("sleep 0.5")
        assert used_mib() < filled - 80
