"""Starting, ending and losing real machines; whatever happens, nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from vmsandbox_hypervisor.api import Confinement, Disk, Kernel, Memory, SharedMemory, VirtiofsShare
from vmsandbox_hypervisor.errors import AccelError, BootError, DeviceError, ExitedError, MonitorError
from vmsandbox_hypervisor.testing import PORT, Stage, TestGuest, booted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmsandbox_hypervisor.api import Hypervisor, Vm, VmConfig

    Booted = Stage[tuple[Vm, TestGuest]]

pytestmark = pytest.mark.deadline(90)


def status_field(pid: int, name: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    raise KeyError(name)


# ---------------------------------------------------------------- starting


async def test_phases_are_told_in_order(vm: Stage[Vm]) -> None:
    async with vm as machine:
        assert list(machine.phases) == ["spawned", "monitor", "running"]
        assert sorted(machine.phases.values()) == list(machine.phases.values())
        assert machine.accel.accel == "tcg"
        assert machine.accel.reason


async def test_qemu_runs_without_any_privilege(vm: Stage[Vm]) -> None:
    async with vm as machine:
        assert set(status_field(machine.pid, "Uid").split()) == {"65534"}
        assert set(status_field(machine.pid, "Gid").split()) == {"65534"}
        assert status_field(machine.pid, "Groups") == ""
        assert status_field(machine.pid, "NoNewPrivs") == "1"
        assert status_field(machine.pid, "Seccomp") == "2"
        for capabilities in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"):
            assert int(status_field(machine.pid, capabilities), 16) == 0
        assert os.getsid(machine.pid) == machine.pid
        environment = Path(f"/proc/{machine.pid}/environ").read_bytes()
        assert b"HOME=" not in environment
        # the sockets are for the owner only
        sockets = list(machine.config.directory.glob("*.sock"))
        assert sockets
        assert {path.stat().st_mode & 0o777 for path in sockets} == {0o600}


async def test_supplementary_groups_are_the_given_ones(hypervisor: Hypervisor, vm_config: VmConfig) -> None:
    config = replace(vm_config, confinement=Confinement(uid=65534, gid=65534, groups=(1234, 42)))
    async with hypervisor.running(config) as machine:
        assert status_field(machine.pid, "Groups") == "42 1234"


async def test_files_only_root_may_read_serve_a_confined_qemu(
    hypervisor: Hypervisor, vm_config: VmConfig, tmp_path: Path
) -> None:
    """Kernel, initrd and boot disk; the directory they are in is closed as well."""
    assert vm_config.kernel.initrd is not None
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    for name, source in [("kernel", vm_config.kernel.path), ("initrd", vm_config.kernel.initrd)]:
        (closed / name).write_bytes(source.read_bytes())
        (closed / name).chmod(0o600)
    (closed / "disk").write_bytes(b"boot disk".ljust(4096))
    (closed / "disk").chmod(0o600)
    kernel = replace(vm_config.kernel, path=closed / "kernel", initrd=closed / "initrd")
    config = replace(vm_config, kernel=kernel, disks=(Disk(id="boot", path=closed / "disk", read_only=True),))
    async with booted(hypervisor.running(config)) as (machine, guest):
        assert await guest.run("head -c 9 /dev/vda") == "boot disk"
        assert machine.devices() == {}
        with pytest.raises(DeviceError, match="from the start"):
            await machine.attach_disk(config.disks[0])


@pytest.mark.parametrize(
    ("change", "words", "phase"),
    [
        ({"binary": Path("/nonexistent/qemu")}, "no QEMU at '/nonexistent/qemu': install qemu-system-x86", "prepared"),
        ({"kernel": Kernel(path=Path("/nonexistent"))}, "cannot open kernel '/nonexistent'", "prepared"),
        ({"kernel": Kernel(path=Path("/"))}, "cannot use kernel '/': not a regular file", "prepared"),
        ({"binary": Path("/bin/true")}, "QEMU ended with status 0", "spawned"),
        ({"disks": (Disk(id="d", path=Path("/dev/null")),)}, "neither a file nor a block device", "prepared"),
        ({"vsock_cid": 77}, "/dev/vhost-vsock", "prepared"),
        ({"memory": Memory(size_mib=1 << 40)}, "mem", "spawned"),
        ({"memory": Memory(size_mib=256, backing=SharedMemory(fd=0))}, "unable to map backing store", "spawned"),
    ],
    ids=[
        "no qemu",
        "no kernel",
        "kernel is a directory",
        "not qemu",
        "no disk",
        "no vsock",
        "too much memory",
        "bad memory fd",
    ],
)
async def test_a_failed_start_names_its_cause_in_one_line(
    hypervisor: Hypervisor, vm_config: VmConfig, change: dict[str, object], words: str, phase: str
) -> None:
    with pytest.raises(BootError) as caught:
        async with hypervisor.running(replace(vm_config, **change)):  # type: ignore[arg-type]
            pytest.fail("it started")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.phase == phase


async def test_a_directory_too_deep_for_sockets_is_refused(hypervisor: Hypervisor, vm_config: VmConfig) -> None:
    deep = vm_config.directory / ("d" * 100)
    deep.mkdir()
    with pytest.raises(BootError, match="longer than 107 bytes: choose a shorter directory"):
        async with hypervisor.running(replace(vm_config, directory=deep)):
            pytest.fail("it started")
    deep.rmdir()


async def test_a_qemu_that_never_answers_is_ended(hypervisor: Hypervisor, vm_config: VmConfig, tmp_path: Path) -> None:
    mute = tmp_path / "mute"
    mute.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    mute.chmod(0o755)
    tmp_path.chmod(0o755)
    config = replace(vm_config, binary=mute, boot_timeout=0.5, confinement=None)
    with pytest.raises(BootError, match=r"no greeting from QEMU's monitor within 0\.5 s") as caught:
        async with hypervisor.running(config):
            pytest.fail("it started")
    assert caught.value.phase == "spawned"


async def test_kvm_that_cannot_work_is_refused_in_seconds(hypervisor: Hypervisor, vm_config: VmConfig) -> None:
    if (await hypervisor.probe_accel("auto")).accel == "kvm":
        assert (await hypervisor.probe_accel("kvm")).accel == "kvm"
        return
    async with asyncio.timeout(8):
        with pytest.raises(AccelError, match="KVM was asked for, but"):
            async with hypervisor.running(replace(vm_config, accel="kvm")):
                pytest.fail("it started")


async def test_an_error_in_the_block_comes_out_as_it_is(vm: Stage[Vm]) -> None:
    with pytest.raises(ZeroDivisionError):
        async with vm:
            raise ZeroDivisionError


@pytest.mark.parametrize("milliseconds", [0, 3, 10, 30, 60, 100, 150, 200])
async def test_a_start_that_is_cancelled_leaves_nothing(
    hypervisor: Hypervisor, vm_config: VmConfig, milliseconds: int
) -> None:
    async def start() -> None:
        async with hypervisor.running(vm_config):
            await asyncio.Event().wait()

    task = asyncio.create_task(start())
    await asyncio.wait({task}, timeout=milliseconds / 1000)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(vm_config.directory.iterdir()) == []


# ---------------------------------------------------------------- ending


async def test_a_guest_that_switches_itself_off_has_not_failed(vm_booted: Booted) -> None:
    async with vm_booted as (machine, guest):
        with pytest.raises(Exception, match="port was closed"):
            await guest.run("poweroff -f")
        assert await machine.wait() == 0
        assert machine.ended() is None
        with pytest.raises(ExitedError, match="ended with status 0"):
            await machine.status()


async def test_a_guest_that_panics_has_failed_and_its_last_words_are_kept(vm_booted: Booted) -> None:
    async with vm_booted as (machine, guest):
        with pytest.raises(Exception, match="port was closed"):
            await guest.run("echo 'famous last words' > /dev/console; echo c > /proc/sysrq-trigger")
        await machine.wait()
        error = machine.ended()
        assert error is not None
        assert str(error) == (
            "virtual machine 'test' ended with status 0: its guest reset itself: "
            "Kernel panic - not syncing: sysrq triggered crash"
        )
        assert "Kernel panic" in error.evidence
        assert "famous last words" in machine.console()
    assert "famous last words" in machine.console()


async def test_power_off_ends_a_guest_that_does_not_listen(vm_booted: Booted) -> None:
    async with vm_booted as (machine, guest):
        await guest.run("true")
        await machine.pause()
        await machine.power_off(timeout=0.2)
        assert await machine.wait() == 0
        assert machine.ended() is None


async def test_a_qemu_that_hangs_is_ended_all_the_same(vm: Stage[Vm]) -> None:
    async with vm as machine:
        os.kill(machine.pid, signal.SIGSTOP)
        await machine.power_off(timeout=0.2)
        assert await machine.wait() == -signal.SIGKILL


async def test_leaving_with_a_hanging_qemu_leaves_nothing(vm: Stage[Vm]) -> None:
    async with vm as machine:
        os.kill(machine.pid, signal.SIGSTOP)
    assert not psutil.pid_exists(machine.pid)


# ---------------------------------------------------------------- losing it


@pytest.mark.parametrize("milliseconds", [0, 1, 2, 4, 8, 16, 40])
async def test_qemu_s_death_during_an_attachment_is_one_error(vm: Stage[Vm], tmp_path: Path, milliseconds: int) -> None:
    async with vm as machine:

        async def keep_attaching() -> None:
            for number in range(1000):
                share = VirtiofsShare(tag=f"s{number}", path=tmp_path)
                await machine.attach_virtiofs(share)

        task = asyncio.create_task(keep_attaching())
        await asyncio.wait({task}, timeout=milliseconds / 1000)
        os.kill(machine.pid, signal.SIGKILL)
        with pytest.raises(ExitedError) as caught:
            await task
        assert caught.value.status == -signal.SIGKILL
        assert caught.value is machine.ended()


async def test_qemu_s_death_ends_a_wait_for_the_guest(vm: Stage[Vm], tmp_path: Path) -> None:
    """The guest of this machine has just begun to boot and releases nothing."""
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    async with vm as machine:
        await machine.attach_disk(Disk(id="d", path=image))
        detaching = asyncio.create_task(machine.detach_disk("d", timeout=60))
        growing = asyncio.create_task(machine.set_memory(512, timeout=60))
        await asyncio.wait({detaching, growing}, timeout=0.05)
        os.kill(machine.pid, signal.SIGKILL)
        for task in (detaching, growing):
            with pytest.raises(ExitedError):
                await task


async def test_virtiofsd_s_death_is_the_vm_s(vm_booted: Booted, tmp_path: Path) -> None:
    async with vm_booted as (machine, guest):
        await machine.attach_virtiofs(VirtiofsShare(tag="share", path=tmp_path))
        await guest.eventually("mount -t virtiofs share /mnt && echo mounted", "mounted")
        os.kill(machine.helper_pids()["share"], signal.SIGKILL)
        await machine.wait()
        error = machine.ended()
        assert error is not None
        assert "because virtiofsd of share 'share' was killed by SIGKILL" in str(error)
        with pytest.raises(ExitedError) as caught:
            await machine.set_cpus(2)
        assert caught.value is error


async def test_a_virtiofsd_that_cannot_start_fails_the_share_only(
    hypervisor: Hypervisor, vm_config: VmConfig, tmp_path: Path
) -> None:
    for program in ("/nonexistent/virtiofsd", "/bin/false"):
        async with hypervisor.running(replace(vm_config, virtiofsd=Path(program))) as machine:
            with pytest.raises(DeviceError, match="share"):
                await machine.attach_virtiofs(VirtiofsShare(tag="share", path=tmp_path))
            assert await machine.status() == "running"
            assert machine.devices() == {}
            assert machine.helper_pids() == {}
            assert machine.ended() is None


async def test_a_virtiofsd_that_hangs_fails_the_share_only(
    hypervisor: Hypervisor, vm_config: VmConfig, tmp_path: Path
) -> None:
    hang = tmp_path / "hang"
    hang.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    hang.chmod(0o755)
    async with hypervisor.running(replace(vm_config, virtiofsd=hang)) as machine:
        task = asyncio.create_task(machine.attach_virtiofs(VirtiofsShare(tag="share", path=tmp_path)))
        await asyncio.wait({task}, timeout=0.5)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await machine.status() == "running"
        assert machine.devices() == {}


@pytest.mark.parametrize("milliseconds", [0, 2, 4, 8, 16, 32])
async def test_virtiofsd_s_death_during_an_attachment_is_one_error(
    vm: Stage[Vm], tmp_path: Path, milliseconds: int
) -> None:
    """Either the share failed and the VM goes on without it, or the VM ends and says why."""
    async with vm as machine:
        attaching = asyncio.create_task(machine.attach_virtiofs(VirtiofsShare(tag="share", path=tmp_path)))
        helpers: list[psutil.Process] = []
        for _ in range(100_000):
            helpers = [child for child in psutil.Process().children() if str(tmp_path) in " ".join(child.cmdline())]
            if helpers or attaching.done():
                break
            await asyncio.sleep(0)
        await asyncio.wait({attaching}, timeout=milliseconds / 1000)
        for helper in helpers:
            helper.kill()
        await asyncio.wait({attaching})
        if isinstance(attaching.exception(), DeviceError):
            assert await machine.status() == "running"
            assert machine.devices() == {}
            assert machine.helper_pids() == {}
            assert machine.ended() is None
        else:
            assert await machine.wait() == -signal.SIGKILL
            assert attaching.exception() in (None, machine.ended())
            assert "because virtiofsd of share 'share' was killed by SIGKILL" in str(machine.ended())


async def test_a_fifo_is_no_disk_and_blocks_nobody(vm: Stage[Vm], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    async with vm as machine:
        with pytest.raises(DeviceError, match="neither a file nor a block device"):
            await machine.attach_disk(Disk(id="d", path=tmp_path / "fifo", read_only=True))


async def test_a_device_that_goes_late_gives_its_port_free(
    hypervisor: Hypervisor, vm_config: VmConfig, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    async with booted(hypervisor.running(replace(vm_config, root_ports=1))) as (machine, guest):
        await machine.attach_disk(Disk(id="a", path=image))
        await guest.eventually("ls /sys/block", "vda")
        events = machine.events()
        with pytest.raises(DeviceError, match="did not release it within 0 s"):
            await machine.detach_disk("a", timeout=0)
        with pytest.raises(DeviceError, match="did not release it within 0 s"):
            await machine.detach_disk("a", timeout=0)
        assert set(machine.devices()) == {"disk-a"}
        async for event in events:
            if event.name == "DEVICE_DELETED" and event.data.get("device") == "disk-a":
                break
        assert machine.devices() == {}
        await machine.attach_disk(Disk(id="a", path=image))
        assert set(machine.devices()) == {"disk-a"}


async def test_a_detachment_that_was_given_up_can_be_awaited_again(vm_booted: Booted, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    async with vm_booted as (machine, guest):
        await machine.attach_disk(Disk(id="a", path=image))
        await guest.eventually("ls /sys/block", "vda")
        with pytest.raises(DeviceError):
            await machine.detach_disk("a", timeout=0)
        await machine.detach_disk("a")
        assert machine.devices() == {}


# ---------------------------------------------------------------- adoption


async def test_a_machine_survives_the_death_of_its_owner(
    hypervisor: Hypervisor, vm_config: VmConfig, owner: subprocess.Popen[bytes]
) -> None:
    assert owner.stdout is not None
    pid, start_time = map(int, (await asyncio.to_thread(owner.stdout.readline)).split())
    owner.kill()
    async with hypervisor.adopted(vm_config, pid=pid, start_time=start_time) as machine:
        guest = TestGuest(machine.port_path(PORT))
        assert await guest.run("echo alive", timeout=60) == "alive"
        assert "test guest is up" in machine.console()
        assert set(machine.devices()) == {"disk-image", "fs-share"}
        assert set(machine.helper_pids()) == {"share"}
        helper = machine.helper_pids()["share"]
        await machine.detach_disk("image")
        await guest.run("echo from the second owner > /dev/console")
        await machine.power_off(timeout=0.1)
        assert "from the second owner" in machine.console()
    assert not psutil.pid_exists(pid)
    assert not psutil.pid_exists(helper) or psutil.Process(helper).status() == psutil.STATUS_ZOMBIE


OWNER = """
import asyncio, pickle, sys
from vmsandbox_hypervisor.api import Disk, VirtiofsShare
from vmsandbox_hypervisor.qemu.machine import QemuHypervisor
from vmsandbox_hypervisor.testing import booted

async def main():
    config, image = pickle.load(sys.stdin.buffer)
    async with booted(QemuHypervisor().running(config)) as (vm, guest):
        await vm.attach_disk(Disk(id="image", path=image))
        await vm.attach_virtiofs(VirtiofsShare(tag="share", path=image.parent))
        print(vm.pid, vm.start_time, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def owner(vm_config: VmConfig, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that starts the machine and then does nothing."""
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    argv = [sys.executable, "-c", OWNER]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(pickle.dumps((vm_config, image)))
        process.stdin.close()
        yield process
        process.kill()


async def test_a_machine_that_is_held_by_somebody_else_is_not_taken(
    hypervisor: Hypervisor, vm_config: VmConfig
) -> None:
    async with hypervisor.running(vm_config) as machine:
        impatient = replace(vm_config, boot_timeout=0.3)
        with pytest.raises(MonitorError, match=r"no greeting from QEMU's monitor within 0\.3 s"):
            async with hypervisor.adopted(impatient, pid=machine.pid, start_time=machine.start_time):
                pytest.fail("adopted it")
        assert await machine.status() == "running"


async def test_adopting_a_dead_machine_says_why_it_died_and_clears_up(
    hypervisor: Hypervisor, vm_config: VmConfig
) -> None:
    async with hypervisor.running(vm_config) as machine:
        machine.release()
    process = psutil.Process(machine.pid)
    process.kill()
    process.wait()
    (vm_config.directory / "qemu.stderr").write_text("qemu-system-x86_64: the reason\n")
    assert list(vm_config.directory.iterdir())
    with pytest.raises(ExitedError, match="virtual machine 'test' is gone: the reason"):
        async with hypervisor.adopted(vm_config, pid=machine.pid, start_time=machine.start_time):
            pytest.fail("adopted it")
    assert list(vm_config.directory.iterdir()) == []


async def test_a_machine_without_its_sockets_cannot_be_adopted_but_destroyed(
    hypervisor: Hypervisor, vm_config: VmConfig, tmp_path: Path
) -> None:
    async with hypervisor.running(vm_config) as machine:
        await machine.attach_virtiofs(VirtiofsShare(tag="s", path=tmp_path))
        machine.release()
        helper = machine.helper_pids()["s"]
    for name in ("qmp.sock", "console.sock"):
        (vm_config.directory / name).unlink()
        with pytest.raises(MonitorError, match="No such file"):
            async with hypervisor.adopted(vm_config, pid=machine.pid, start_time=machine.start_time):
                pytest.fail("adopted it")
    await hypervisor.destroy(vm_config, pid=machine.pid, start_time=machine.start_time)
    for pid in (machine.pid, helper):
        assert not psutil.pid_exists(pid)
    assert list(vm_config.directory.iterdir()) == []


async def test_what_a_predecessor_left_behind_is_no_obstacle(hypervisor: Hypervisor, vm_config: VmConfig) -> None:
    for name in ("console.sock", "qmp.sock", "qemu.stderr", "virtiofs-0123456789abcdef.json"):
        (vm_config.directory / name).touch()
    (vm_config.directory / "console.log").write_text("an older machine")
    async with hypervisor.running(vm_config) as machine:
        assert "older" not in machine.console()


# ---------------------------------------------------------------- console and events


async def test_a_guest_that_prints_for_ever_fills_nothing_and_is_not_blocked(vm_booted: Booted) -> None:
    async with vm_booted as (machine, guest):
        await guest.run("yes 0123456789abcdef | head -c 400000 > /dev/ttyS0; echo the end > /dev/ttyS0", timeout=80)
        assert await guest.run("echo alive") == "alive"
        assert "the end" in machine.console()
        assert len(machine.console()) <= 64 * 1024
        log = machine.config.directory / "console.log"
        assert log.stat().st_size <= 256 * 1024
        assert b"the end" in log.read_bytes()


async def test_a_reader_of_events_that_sleeps_loses_the_oldest(vm: Stage[Vm]) -> None:
    async with vm as machine:
        events = machine.events()
        for _ in range(150):
            await machine.pause()
            await machine.resume()
        await machine.kill()
        names = [event.name async for event in events]
        assert len(names) == 256
        assert set(names) == {"STOP", "RESUME"}
