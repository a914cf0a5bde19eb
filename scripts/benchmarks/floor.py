"""The floor: a bare QEMU that boots the guest's kernel into an init that does nothing but power off.

No container system that boots a kernel can be faster than that, so start times are given as multiples of it: the
machine they were measured on cancels out.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import time
from functools import cache
from typing import TYPE_CHECKING

from scripts.benchmarks import processes
from scripts.benchmarks.processes import CommandError
from scripts.benchmarks.rows import Row, measurement
from vmsandbox.guestbuild.floor import floor_initrd
from vmsandbox_hypervisor import kernel as parameters
from vmsandbox_hypervisor.frequency import host_khz
from vmsandbox_hypervisor.qemu.machine import QemuHypervisor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Literal

    from scripts.benchmarks.workplace import Workplace

#: the kernel's last words, printed whatever its log level
MARK = b"reboot: Power down"
MEMORY_MIB = 256
TIMEOUT = 300.0
CONSOLE_FD, MONITOR_FD = 3, 4


@measurement(
    Row("cold_boot_floor", "s", "bare QEMU boot of the guest's kernel to power-off"),
    Row("cold_boot_floor.qemu", "s", "of it QEMU's own start", against="cold_boot_floor"),
    Row("cold_boot_floor.boot", "s", "of it firmware and kernel, init's request included", against="cold_boot_floor"),
    Row("cold_boot_floor.power_off", "s", "of it switching off", against="cold_boot_floor"),
    Row("cold_boot_floor.cpu", "s", "CPU time of QEMU for that", against="cold_boot_floor"),
)
def cold_boot_floor(place: Workplace) -> Mapping[str, float]:
    """Default firmware, default kernel parameters."""
    found = boot(place, name="cold_boot_floor", machine=[], cmdline=("console=ttyS0", "quiet", "panic=-1"))
    place.notes["qemu"] = found["cold_boot_floor.qemu"]
    return found


@measurement(
    Row(
        "tuned_boot_floor", "s", "the same with the firmware and kernel parameters of a pod", against="cold_boot_floor"
    ),
)
def tuned_boot_floor(place: Workplace) -> Mapping[str, float]:
    """What choosing firmware and parameters gains before anything of a pod is started."""
    cmdline = parameters.parameters(acceleration(), khz=host_khz())
    found = boot(place, name="tuned_boot_floor", machine=["-bios", "qboot.rom"], cmdline=cmdline)
    return {"tuned_boot_floor": found["tuned_boot_floor"]}


@cache
def acceleration() -> Literal["kvm", "tcg"]:
    """What pods use here."""
    return asyncio.run(QemuHypervisor().probe_accel("auto")).accel


def boot(place: Workplace, *, name: str, machine: list[str], cmdline: tuple[str, ...]) -> dict[str, float]:
    """Boot once to the end; the whole and its parts in seconds."""
    accel = acceleration()
    archive = place.directory / "floor.cpio"
    if not archive.exists():
        floor_initrd(archive)
    # fmt: off
    argv = [
        place.tool("qemu-system-x86_64"), "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-machine", "q35", "-accel", "kvm" if accel == "kvm" else "tcg,thread=multi",
        "-cpu", "host" if accel == "kvm" else "max", "-m", str(MEMORY_MIB),
        "-kernel", str(place.guest.kernel), "-initrd", str(archive), "-append", " ".join(cmdline),
        "-chardev", f"socket,id=console,fd={CONSOLE_FD}", "-device", "isa-serial,chardev=console",
        "-chardev", f"socket,id=monitor,fd={MONITOR_FD}", "-mon", "chardev=monitor,mode=control",
        *machine,
    ]
    # fmt: on
    console, its_console = socket.socketpair()
    monitor, its_monitor = socket.socketpair()
    with console, monitor:
        with its_console, its_monitor:
            started = time.monotonic()
            pid = processes.spawn(
                argv, files={CONSOLE_FD: its_console.fileno(), MONITOR_FD: its_monitor.fileno()}, stderr=2
            )
        try:
            greeted, marked = _milestones(console, monitor)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            ended = time.monotonic()
        finally:
            os.kill(pid, signal.SIGKILL)
            accounts, _ = processes.reap(pid)
    return {
        name: ended - started,
        f"{name}.qemu": greeted - started,
        f"{name}.boot": marked - greeted,
        f"{name}.power_off": ended - marked,
        f"{name}.cpu": accounts.total,
    }


def _milestones(console: socket.socket, monitor: socket.socket) -> tuple[float, float]:
    """When QEMU greeted and when the kernel switched off; returns at the end of QEMU."""
    poll = select.poll()
    poll.register(console, select.POLLIN)
    poll.register(monitor, select.POLLIN)
    greeted = marked = 0.0
    printed = b""
    deadline = time.monotonic() + TIMEOUT
    while True:
        ready = dict(poll.poll(1000 * TIMEOUT))
        now = time.monotonic()
        if now > deadline:
            raise CommandError(f"the bare boot did not end within {TIMEOUT:g} s")
        if monitor.fileno() in ready and monitor.recv(65536):
            greeted = greeted or now
        if console.fileno() in ready:
            data = console.recv(65536)
            if not data:
                break
            printed += data
            if not marked and MARK in printed:
                marked = now
    if not marked or not greeted:
        last = printed.decode(errors="replace").strip().splitlines()
        raise CommandError(
            f"the bare boot ended before its init switched off: {last[-1] if last else 'nothing was printed'}"
        )
    return greeted, marked
