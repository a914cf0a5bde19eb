"""Devices in config.json: which are the guest's own, which disks of the host are meant, and which cannot be had.

A device is named by its numbers.  Those that the kernel gives every machine alike (null, zero, fuse, tun and the like)
are the guest's.  A block device is a disk of the host: it is plugged into the virtual machine and gets other numbers
there, so rules and limits that name it are rewritten once those are known.  Any other device is hardware
or a driver of the host, and refused.

A privileged container is one whose device rules allow everything: engines then list whatever the host has.  It gets
whatever the virtual machine has, and what is listed beyond that is left out.

Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vmsandbox.oci.linux import Device, DeviceRule

#: character devices whose numbers mean the same on every machine: major -> minors, None for all
SAME_EVERYWHERE: dict[int, frozenset[int] | None] = {
    1: frozenset({1, 3, 5, 7, 8, 9, 11}),  # mem, null, zero, full, random, urandom, kmsg
    5: frozenset({0, 1, 2}),  # tty, console, ptmx
    10: frozenset({200, 229, 237}),  # net/tun, fuse, loop-control
    **dict.fromkeys(range(136, 144)),  # pseudo terminals
}
_DEFAULT_MODE = 0o666
#: lists of blockIO whose entries name devices
PER_DEVICE = (
    "weightDevice",
    "throttleReadBpsDevice",
    "throttleWriteBpsDevice",
    "throttleReadIOPSDevice",
    "throttleWriteIOPSDevice",
)

Numbers = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class HostDisk:
    """A block device of the host that a container wants to see as `path`; `member` is what asks for it."""

    member: str
    path: str
    numbers: Numbers
    #: what the container is not allowed to write the machine need not be able to write
    read_only: bool
    mode: int = _DEFAULT_MODE
    uid: int = 0
    gid: int = 0
    #: index of a bind mount in the document that gets the node as its source; None: a node that crun makes
    mount: int | None = None


@dataclass(kw_only=True)
class Sorted:
    """What `linux.devices` comes to."""

    #: entries for the guest, by their index in the list
    guest: list[int] = field(default_factory=list)
    disks: list[HostDisk] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def is_same_everywhere(major: int, minor: int) -> bool:
    """Whether these numbers of a character device mean the same in the guest."""
    minors = SAME_EVERYWHERE.get(major, frozenset())
    return minors is None or minor in minors


def is_privileged(rules: Iterable[DeviceRule]) -> bool:
    """Whether the last word about devices is that everything is allowed."""
    allowed = False
    for rule in rules:
        if rule.type in ("", "a") and rule.major in (None, -1) and rule.minor in (None, -1):
            allowed = rule.allow and set(rule.access or "rwm") == set("rwm")
    return allowed


def sort(devices: Sequence[Device], rules: Sequence[DeviceRule]) -> Sorted:
    """Tell the guest's devices from disks of the host.  Raises UnsupportedError for those that are neither."""
    found = Sorted()
    privileged = is_privileged(rules)
    for index, device in enumerate(devices):
        member = f"linux.devices[{index}]"
        numbers = (device.major or 0, device.minor or 0)
        if device.type == "p" or (device.type in "cu" and is_same_everywhere(*numbers)):
            found.guest.append(index)
        elif privileged:
            found.left_out.append(device.path)
        elif device.type == "b":
            found.disks.append(
                HostDisk(
                    member=member,
                    path=device.path,
                    numbers=numbers,
                    read_only=not may_write(rules, numbers),
                    mode=_DEFAULT_MODE if device.file_mode is None else device.file_mode & 0o7777,
                    uid=device.uid or 0,
                    gid=device.gid or 0,
                )
            )
        else:
            what = (
                "hardware of the host" if _is_vfio(device.path) else f"driver of the host ({numbers[0]}:{numbers[1]})"
            )
            raise UnsupportedError(
                f"'{member}' is '{device.path}', which stands for {what}: it cannot be passed through to a virtual "
                "machine; disks can, and the devices that every Linux has"
            )
    return found


def _is_vfio(path: str) -> bool:
    return path.startswith("/dev/vfio")


def may_write(rules: Iterable[DeviceRule], numbers: Numbers) -> bool:
    """Whether the rules let a container write to a block device; the last one that speaks of it counts."""
    answer = False
    for rule in rules:
        if rule.type not in ("", "a", "b"):
            continue
        if rule.major not in (None, -1, numbers[0]) or rule.minor not in (None, -1, numbers[1]):
            continue
        if "w" in (rule.access or "rwm"):
            answer = rule.allow
    return answer


def placed(resources: dict[str, Any], places: Mapping[Numbers, Numbers]) -> dict[str, Any]:
    """LinuxResources with the guest's numbers of disks; `places` tells them of each that was plugged.

    Raises UnsupportedError for limits of others.
    """
    made = dict(resources)
    if made.get("devices"):
        made["devices"] = placed_rules(made["devices"], places)
    if made.get("blockIO"):
        made["blockIO"] = placed_block_io(made["blockIO"], places)
    return made


def placed_rules(rules: Iterable[dict[str, Any]], places: Mapping[Numbers, Numbers]) -> list[dict[str, Any]]:
    """Device rules with the guest's numbers; `places` tells those of each disk that was plugged.

    A rule about a disk of the host that was not is left out: its numbers might be another disk's in the guest.
    """
    made = []
    for rule in rules:
        numbers = (rule.get("major"), rule.get("minor"))
        if rule.get("type") != "b" or (numbers[0] in (None, -1) and numbers[1] in (None, -1)):
            made.append(rule)
        elif numbers in places:
            major, minor = places[numbers]  # type: ignore[index]
            made.append({**rule, "major": major, "minor": minor})
    return made


def placed_block_io(given: Mapping[str, Any], places: Mapping[Numbers, Numbers]) -> dict[str, Any]:
    """A blockIO object with the guest's numbers.  Raises UnsupportedError for disks that were not plugged."""
    made = dict(given)
    for name in PER_DEVICE:
        if not given.get(name):
            continue
        entries = []
        for entry in given[name]:
            numbers = (entry.get("major"), entry.get("minor"))
            if numbers not in places:
                raise _unplugged(name, numbers)
            major, minor = places[numbers]
            entries.append({**entry, "major": major, "minor": minor})
        made[name] = entries
    return made


def check_block_io(given: Mapping[str, Any], plugged: Iterable[Numbers]) -> None:
    """Raise UnsupportedError for limits of disks that the container is not given."""
    placed_block_io(given, {numbers: numbers for numbers in plugged})


def _unplugged(name: str, numbers: tuple[Any, Any]) -> UnsupportedError:
    return UnsupportedError(
        f"'linux.resources.blockIO.{name}' limits the host's disk {numbers[0]}:{numbers[1]}, which the container is "
        "not given: limits hold for disks in 'linux.devices' and for a root file system on a disk of its own"
    )
