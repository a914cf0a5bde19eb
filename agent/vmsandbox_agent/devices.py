"""Devices that appear while the guest runs: where they are in /sys, and waiting for them without polling.

The host names a device by its place: ``DD.F/DD.F`` is the slot and function of a root port on bus 0, then those of
the device on the bus behind it, in hex.  The kernel announces every change by a uevent; a waiter subscribes first,
then looks, then sleeps until the next uevent and looks again.
"""

from __future__ import annotations

import _socket as socket
import os
import re
import select
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from vmsandbox_agent.errors import InvalidArgumentError, TimedOutError

if TYPE_CHECKING:
    from collections.abc import Callable

SYS = Path("/sys")
DEV = Path("/dev")
#: seconds that a hot-plugged device may take to appear
TIMEOUT = 20.0

_NETLINK_KOBJECT_UEVENT = 15
_PCI_PATH = re.compile(r"[0-9a-f]{2}\.[0-7](/[0-9a-f]{2}\.[0-7])*")
#: letters of a PCI device's name in /sys, as in 0000:05:00.0
_PCI_NAME = 12

T = TypeVar("T")


class BlockDevice(NamedTuple):
    """A disk or a partition."""

    node: str
    major: int
    minor: int


class Uevents:
    """The kernel's announcements since this object was made."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_KOBJECT_UEVENT
        )
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.bind((0, 1))
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    def wait(self, seconds: float) -> bool:
        """Sleep until something changed; False if nothing did."""
        if not self._poll.poll(max(0, seconds) * 1000):
            return False
        with suppress(BlockingIOError, OSError):
            while self._socket.recv(8192, socket.MSG_DONTWAIT):
                pass
        return True

    def close(self) -> None:
        self._socket.close()


def wait_for(
    look: Callable[[], T | None],
    what: str,
    *,
    timeout: float = TIMEOUT,
    subscribe: Callable[[], Uevents] = Uevents,
) -> T:
    """Look again after every uevent until `look` answers something; raises TimedOutError."""
    found = look()
    if found is not None:
        return found
    uevents = subscribe()
    try:
        deadline = time.monotonic() + timeout
        while True:
            found = look()
            if found is not None:
                return found
            if not uevents.wait(deadline - time.monotonic()):
                raise TimedOutError(f"{what} has not appeared after {timeout:g} s")
    finally:
        uevents.close()


def pci_directory(pci_path: str, sys: Path = SYS) -> Path | None:
    """The directory of the device at a place, None if there is nothing yet; InvalidArgumentError for nonsense."""
    _check_place(pci_path)
    directory = sys / "bus/pci/devices"
    prefix = "0000:00:"
    for slot in pci_path.split("/"):
        found = [name for name in _names(directory) if name.startswith(prefix) and name.endswith(f":{slot}")]
        if len(found) != 1:
            return None
        directory = directory / found[0]
        prefix = "0000:"  # whichever bus is behind the port
    return directory


def _check_place(pci_path: str) -> None:
    if not _PCI_PATH.fullmatch(pci_path):
        raise InvalidArgumentError(f"'{pci_path}' is not a place of a PCI device: it is like '02.3/00.0'")


def block_device(pci_path: str, partition: int = 0, *, sys: Path = SYS, dev: Path = DEV) -> BlockDevice | None:
    """The disk (or a partition of it) behind the device at a place, None if it is not there yet.

    Disks are asked where they are: they are fewer than the devices that could have one.
    """
    _check_place(pci_path)
    disks = sys / "block"
    for name in _names(disks):
        disk = disks / name
        if _place_of(disk) != pci_path:
            continue
        if partition:
            parts = [disk / each for each in _names(disk) if _text(disk / each / "partition") == str(partition)]
            if not parts:
                return None
            disk = parts[0]
        return _described(disk, dev)
    return None


def _place_of(disk: Path) -> str:
    """The place of the device that a disk in /sys/block is behind, "" if it is none of PCI.

    The link reads ``../devices/pci0000:00/0000:00:02.3/0000:05:00.0/virtio4/block/vda``.
    """
    try:
        parts = os.readlink(disk).split("/")
    except OSError:
        return ""  # it has just gone
    return "/".join(part[8:] for part in parts if len(part) == _PCI_NAME and part[4] == part[7] == ":")


def block_device_at(node: str) -> BlockDevice:
    """The block device whose node is at `node`."""
    status = os.stat(node)
    return BlockDevice(node, os.major(status.st_rdev), os.minor(status.st_rdev))


def wait_for_block(pci_path: str, partition: int = 0, *, timeout: float = TIMEOUT) -> BlockDevice:
    what = f"disk at '{pci_path}'" + (f" partition {partition}" if partition else "")
    return wait_for(lambda: block_device(pci_path, partition), what, timeout=timeout)


def _described(disk: Path, dev: Path) -> BlockDevice | None:
    numbers = _text(disk / "dev").partition(":")
    node = dev / disk.name
    if not numbers[2] or not node.exists() or _text(disk / "size") in ("", "0"):
        return None
    return BlockDevice(str(node), int(numbers[0]), int(numbers[2]))


def port_named(name: str, *, sys: Path = SYS, dev: Path = DEV) -> Path | None:
    """The device node of the virtio-serial port with this name."""
    ports = sys / "class/virtio-ports"
    for port in _names(ports):
        if _text(ports / port / "name") == name and (dev / port).exists():
            return dev / port
    return None


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
