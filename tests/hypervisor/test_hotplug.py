"""Hot-plug, seen from the guest.  One machine serves all tests; each leaves it as it was."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import struct
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from vmsandbox_hypervisor.api import Disk, Nic, NinePShare, VirtiofsShare
from vmsandbox_hypervisor.errors import DeviceError
from vmsandbox_hypervisor.testing import booted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vmsandbox_hypervisor.api import Hypervisor, PciAddress, Vm, VmConfig
    from vmsandbox_hypervisor.testing import Stage, TestGuest

    Booted = Stage[tuple[Vm, TestGuest]]

pytestmark = pytest.mark.deadline(90)


def device(address: PciAddress) -> str:
    """A glob for what is at an address: bus numbers are the guest's own choice."""
    port, _, behind = address.pci_path.partition("/")
    return f"/sys/devices/pci0000:00/0000:00:{port}/0000:*:{behind}"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Four MiB that only root may read."""
    path = tmp_path / "image"
    path.write_bytes(os.urandom(4 * 1024 * 1024))
    path.chmod(0o600)
    return path


async def test_a_disk_is_where_its_address_says_and_has_the_file_s_bytes(vm_shared: Booted, image: Path) -> None:
    async with vm_shared as (vm, guest):
        address = await vm.attach_disk(Disk(id="data", path=image, read_only=True))
        name = await guest.eventually(f"ls {device(address)}/virtio*/block", "vda")
        assert await guest.run(f"cat /sys/block/{name}/serial") == "data"
        assert await guest.run(f"cat /sys/block/{name}/ro") == "1"
        digest = await guest.run(f"sha256sum /dev/{name} | cut -d' ' -f1")
        assert digest == hashlib.sha256(image.read_bytes()).hexdigest()
        await vm.detach_disk("data")
        assert await guest.run("ls /sys/block") == ""
        assert vm.devices() == {}


async def test_a_file_that_is_only_read_is_attached_whoever_has_locked_it(vm_shared: Booted, image: Path) -> None:
    everything = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    async with vm_shared as (vm, guest):
        with image.open("rb") as held:
            fcntl.fcntl(held, fcntl.F_OFD_SETLK, everything)
            await vm.attach_disk(Disk(id="held", path=image, read_only=True))
            await guest.eventually("ls /sys/block", "vda")
        await vm.detach_disk("held")


async def test_what_the_guest_writes_arrives_in_the_file(vm_shared: Booted, image: Path) -> None:
    async with vm_shared as (vm, guest):
        await vm.attach_disk(Disk(id="scratch", path=image))
        await guest.eventually("ls /sys/block", "vda")
        await guest.run("printf hello | dd of=/dev/vda bs=1 seek=4096 conv=notrunc; sync")
        await vm.detach_disk("scratch")
        assert image.read_bytes()[4096:4101] == b"hello"


async def test_a_long_disk_id_is_cut_to_a_serial_and_still_unique(vm_shared: Booted, image: Path) -> None:
    long = "0123456789abcdef" * 4
    async with vm_shared as (vm, guest):
        await vm.attach_disk(Disk(id=long, path=image, read_only=True))
        await vm.attach_disk(Disk(id=long[:-1] + "0", path=image, read_only=True))
        await guest.eventually("ls /sys/block | wc -l", "2")
        assert await guest.run("cat /sys/block/vda/serial") == long[:20]
        await asyncio.gather(vm.detach_disk(long), vm.detach_disk(long[:-1] + "0"))


async def test_a_block_device_is_attached_like_a_file(vm_shared: Booted, loop_device: Path) -> None:
    async with vm_shared as (vm, guest):
        await vm.attach_disk(Disk(id="loop", path=loop_device, read_only=True))
        await guest.eventually("ls /sys/block", "vda")
        assert await guest.run("cat /sys/block/vda/size") == str(4 * 1024 * 2)
        await vm.detach_disk("loop")


@pytest.fixture
def loop_device(image: Path) -> Iterator[Path]:
    path = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", str(image)], check=True, capture_output=True, text=True
    ).stdout.strip()
    yield image.__class__(path)
    subprocess.run(["losetup", "--detach", path], check=True)


async def test_a_disk_that_cannot_be_opened_takes_no_slot(vm_shared: Booted, tmp_path: Path) -> None:
    async with vm_shared as (vm, _):
        with pytest.raises(DeviceError, match="cannot open disk"):
            await vm.attach_disk(Disk(id="none", path=tmp_path / "none"))
        with pytest.raises(DeviceError, match="neither a file nor a block device"):
            await vm.attach_disk(Disk(id="directory", path=tmp_path, read_only=True))
        assert vm.devices() == {}


async def test_what_qemu_refuses_is_said_in_its_words_and_leaves_nothing(vm_shared: Booted, tmp_path: Path) -> None:
    empty = tmp_path / "locked"
    empty.write_bytes(bytes(512))
    async with vm_shared as (vm, _):
        await vm.attach_disk(Disk(id="first", path=empty))
        with pytest.raises(DeviceError, match="lock") as caught:
            await vm.attach_disk(Disk(id="second", path=empty))
        assert "lock" in caught.value.reason
        assert set(vm.devices()) == {"disk-first"}
        await vm.detach_disk("first")
        await vm.attach_disk(Disk(id="second", path=empty))
        await vm.detach_disk("second")


async def test_a_nic_comes_with_its_mac_and_mtu_and_goes(vm_shared: Booted, tap: int) -> None:
    async with vm_shared as (vm, guest):
        address = await vm.attach_nic(Nic(id="eth", tap_fd=tap, mac="52:54:00:12:34:56", mtu=1400))
        name = await guest.eventually(f"ls {device(address)}/virtio*/net", "eth0")
        assert await guest.run(f"cat /sys/class/net/{name}/address") == "52:54:00:12:34:56"
        assert await guest.run(f"cat /sys/class/net/{name}/mtu") == "1400"
        await guest.run(f"ip link set {name} up")
        await vm.detach_nic("eth")
        assert await guest.run("ls /sys/class/net") == "lo"
        await vm.attach_nic(Nic(id="eth", tap_fd=tap, mac="52:54:00:12:34:57"))
        await vm.detach_nic("eth")


async def test_a_nic_of_the_start_goes_and_comes_as_any_other(
    hypervisor: Hypervisor, vm_config: VmConfig, tap: int
) -> None:
    first = Nic(id="first", tap_fd=tap, mac="52:54:00:12:34:58", mtu=0)
    async with booted(hypervisor.running(replace(vm_config, nics=(first,)))) as (vm, guest):
        address = vm.devices()["nic-first"]
        assert await guest.run(f"ls {device(address)}/virtio*/net") == "eth0"
        await guest.run("ip link set eth0 address 52:54:00:12:34:59; ip link set eth0 mtu 9000; ip link set eth0 up")
        await vm.detach_nic("first")
        assert await guest.run("ls /sys/class/net") == "lo"
        assert await vm.attach_nic(replace(first, mtu=1400)) == address
        await guest.eventually("cat /sys/class/net/eth0/mtu", "1400")


async def test_a_directory_is_shared_by_virtiofs_both_ways(vm_shared: Booted, tmp_path: Path) -> None:
    (tmp_path / "from-host").write_text("hello")
    (tmp_path / "from-host").chmod(0o640)
    os.chown(tmp_path / "from-host", 1234, 5678)
    async with vm_shared as (vm, guest):
        await vm.attach_virtiofs(VirtiofsShare(tag="share", path=tmp_path))
        assert set(vm.helper_pids()) == {"share"}
        await guest.eventually("mount -t virtiofs share /mnt && echo mounted", "mounted")
        assert await guest.run("stat -c '%u %g %a' /mnt/from-host; cat /mnt/from-host") == "1234 5678 640\nhello"
        await guest.run("echo back > /mnt/from-guest; chown 12:34 /mnt/from-guest")
        assert (tmp_path / "from-guest").read_text() == "back\n"
        assert (tmp_path / "from-guest").stat().st_uid == 12
        await guest.run("umount /mnt")
        await vm.detach_virtiofs("share")
        assert vm.helper_pids() == {}
        assert vm.devices() == {}


async def test_a_directory_with_a_comma_and_a_backslash_is_shared(vm_shared: Booted, tmp_path: Path) -> None:
    odd = tmp_path / "a,b\\c d"
    odd.mkdir()
    (odd / "file").write_text("odd")
    async with vm_shared as (vm, guest):
        await vm.attach_virtiofs(VirtiofsShare(tag="odd", path=odd, cache="none"))
        await guest.eventually("mount -t virtiofs odd /mnt && cat /mnt/file; umount /mnt", "odd")
        await vm.detach_virtiofs("odd")


async def test_a_share_of_nothing_is_refused(vm_shared: Booted, tmp_path: Path) -> None:
    async with vm_shared as (vm, _):
        with pytest.raises(DeviceError, match="no such directory"):
            await vm.attach_virtiofs(VirtiofsShare(tag="none", path=tmp_path / "none"))
        assert vm.devices() == {}
        assert vm.helper_pids() == {}


async def test_a_9p_share_that_was_not_declared_is_refused(vm_shared: Booted, tmp_path: Path) -> None:
    async with vm_shared as (vm, _):
        with pytest.raises(DeviceError, match="declare it"):
            await vm.attach_9p(NinePShare(tag="late", path=tmp_path))


async def test_devices_of_a_predecessor_are_known_after_an_adoption(
    vm_shared: Booted, image: Path, tmp_path: Path
) -> None:
    async with vm_shared as (vm, _):
        disk = await vm.attach_disk(Disk(id="kept", path=image, read_only=True))
        await vm.attach_virtiofs(VirtiofsShare(tag="kept", path=tmp_path))
        before = dict(vm.devices())
        helpers = dict(vm.helper_pids())
    async with vm_shared as (vm, guest):
        assert vm.devices() == before
        assert vm.helper_pids() == helpers
        with pytest.raises(DeviceError, match="attached already"):
            await vm.attach_disk(Disk(id="kept", path=image, read_only=True))
        await guest.eventually(f"ls {device(disk)}/virtio*/block", "vda")
        await vm.detach_disk("kept")
        await vm.detach_virtiofs("kept")
        assert vm.devices() == {}
