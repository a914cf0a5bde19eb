"""Which acceleration works here, and why.

That /dev/kvm can be opened proves nothing: some hosts offer a KVM on which no ordinary guest gets anywhere.  So
``auto`` looks at the cheap signs first and then has a guest execute a few instructions.  The answer is remembered
until the host boots again or QEMU is replaced.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from vmsandbox_hypervisor.aio import finish
from vmsandbox_hypervisor.api import AccelChoice
from vmsandbox_hypervisor.children import confined, described, spawn
from vmsandbox_hypervisor.errors import AccelError
from vmsandbox_hypervisor.evidence import reason_in

if TYPE_CHECKING:
    from typing import Literal

    from vmsandbox_hypervisor.api import Accel, VmConfig

DEVICE = Path("/dev/kvm")
CPUINFO = Path("/proc/cpuinfo")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
#: seconds a guest of a few instructions may take
PROBE_TIMEOUT = 5.0
EXIT_PORT = 0xF4
EXIT_VALUE = 0x2A
#: isa-debug-exit turns a value into an exit status like this
EXIT_STATUS = EXIT_VALUE << 1 | 1
#: mov al, EXIT_VALUE; out EXIT_PORT, al; hlt; jmp back to the hlt - at the reset vector, 16 bytes below 4 GiB
PROGRAM = bytes([0xB0, EXIT_VALUE, 0xE6, EXIT_PORT, 0xF4, 0xEB, 0xFD])
FIRMWARE_SIZE = 64 * 1024

TCG = "software emulation was asked for"


def obstacle(*, device: Path = DEVICE, cpuinfo: Path = CPUINFO) -> str | None:
    """The cheap sign that KVM cannot work, in words; None if there is none."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"'{device}' cannot be opened: {error.strerror}"
    if re.search(r"^flags\s*:.*\b(?:vmx|svm)\b", cpuinfo.read_text(), re.MULTILINE) is None:
        return "the CPU offers neither vmx nor svm"
    return None


def likely() -> AccelChoice:
    """What ``auto`` will probably choose, by the cheap signs alone."""
    if why := obstacle():
        return AccelChoice(accel="tcg", reason=f"KVM does not work here: {why}")
    return AccelChoice(accel="kvm", reason="the CPU and the kernel offer KVM")


async def chosen(
    accel: Accel, *, binary: Path, cache: Path | None = None, device: Path = DEVICE, cpuinfo: Path = CPUINFO
) -> AccelChoice:
    """Settle `accel`.

    ``kvm`` is tried even where the CPU's flags speak against it; `AccelError` within seconds if it does not work.
    """
    if accel == "tcg":
        return AccelChoice(accel="tcg", reason=TCG)
    if accel == "auto":
        if why := obstacle(device=device, cpuinfo=cpuinfo):
            return AccelChoice(accel="tcg", reason=f"KVM does not work here: {why}")
    elif not os.access(device, os.R_OK | os.W_OK):
        raise AccelError(f"KVM was asked for, but '{device}' cannot be opened: {_denial(device)}")
    failure = await _remembered(binary, cache)
    if failure is None:
        return AccelChoice(accel="kvm", reason="a guest ran with it")
    if accel == "kvm":
        # QEMU's words are often those of an assertion.
        why = obstacle(device=device, cpuinfo=cpuinfo) or failure
        raise AccelError(f"KVM was asked for, but it does not work here: {why}")
    return AccelChoice(accel="tcg", reason=f"KVM does not work here: {failure}")


def permitted(choice: AccelChoice, config: VmConfig, *, device: Path = DEVICE) -> AccelChoice:
    """The choice for a QEMU that runs as somebody else, who may not open the device that we could try.

    `AccelError` where KVM was asked for, emulation where it was only the best.
    """
    identity = config.confinement
    if choice.accel != "kvm" or identity is None:
        return choice
    info = device.stat()
    bits = stat.S_IRUSR | stat.S_IWUSR
    if info.st_uid != identity.uid:
        bits >>= 3 if info.st_gid in (identity.gid, *identity.groups) else 6
    if info.st_mode & bits == bits:
        return choice
    why = (
        f"'{device}' is not for uid {identity.uid}, which QEMU has: give a group of its the right, or do not confine it"
    )
    if config.accel == "kvm":
        raise AccelError(f"KVM was asked for, but {why}")
    return AccelChoice(accel="tcg", reason=f"KVM does not work here: {why}")


def _denial(device: Path) -> str:
    return "permission denied" if device.exists() else "there is none"


async def _remembered(binary: Path, cache: Path | None) -> str | None:
    """`tried`, asked once per boot of the host and build of QEMU."""
    try:
        info = binary.stat()
    except OSError:
        return f"there is no QEMU at '{binary}'"
    key = [BOOT_ID.read_text().strip(), str(binary), info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns]
    if cache is not None:
        try:
            content = json.loads(cache.read_bytes())
            if content["key"] == key and isinstance(content["failure"], str | None):
                return content["failure"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or not ours: the answer is found again
    failure = await tried("kvm", binary=binary)
    if cache is not None:
        _remember(cache, {"key": key, "failure": failure})
    return failure


def _remember(cache: Path, content: object) -> None:
    try:
        fd, name = tempfile.mkstemp(dir=cache.parent, prefix=f".{cache.name}-")
    except OSError:
        return  # a cache that cannot be written costs time, nothing else
    try:
        with open(fd, "w") as file:
            json.dump(content, file)
        os.replace(name, cache)
    except OSError:
        Path(name).unlink(missing_ok=True)


async def tried(accel: Literal["kvm", "tcg"], *, binary: Path, timeout: float = PROBE_TIMEOUT) -> str | None:
    """Have a guest execute a few instructions; None if it did, else what went wrong."""
    firmware = os.memfd_create("firmware", os.MFD_CLOEXEC)
    stderr = os.memfd_create("stderr", os.MFD_CLOEXEC)
    try:
        os.pwrite(firmware, PROGRAM, FIRMWARE_SIZE - 16)
        os.ftruncate(firmware, FIRMWARE_SIZE)
        # fmt: off
        line = [
            str(binary), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-machine", "q35", "-m", "16", "-accel", accel, "-cpu", "host" if accel == "kvm" else "max",
            "-device", f"isa-debug-exit,iobase={EXIT_PORT:#x},iosize=1",
            "-bios", "/proc/self/fd/3",
        ]
        # fmt: on
        try:
            child = spawn("probe", confined(line, None), fds={3: firmware}, stderr=stderr)
        except OSError as error:
            return f"QEMU cannot be executed: {error}"
        try:
            await asyncio.wait({child.exited}, timeout=timeout)
            ended = child.exited.done()
        finally:
            await finish(child.stop())
        if not ended:
            return f"a guest of a few instructions did not end within {timeout:g} s"
        status = child.exited.result()
        if status == EXIT_STATUS:
            return None
        words = reason_in(os.pread(stderr, 4096, 0).decode(errors="replace"))
        return words or f"QEMU {described(status)}"
    finally:
        os.close(firmware)
        os.close(stderr)
