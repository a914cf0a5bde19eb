"""The guest's network: its interfaces become what the host says, by rtnetlink.

The host names a device by its place on the PCI bus or by its MAC address; the name is the host's choice.  Addresses,
routes and neighbours are those that the host found in the pod's network namespace, completely: the kernel's own guess
of what routes an address brings along is only taken where the host left the routes to it.
"""

from __future__ import annotations

import _socket as socket
import errno
import os
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vmsandbox_agent import devices, inet, routes
from vmsandbox_agent.errors import InvalidArgumentError, NotFoundError
from vmsandbox_agent.rtnetlink import CREATE, EXCLUSIVE, REPLACE, Rtnetlink, refused
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vmsandbox_agent.rtnetlink import Attribute

_NEWLINK, _GETLINK, _SETLINK = 16, 18, 19
_NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
_NEWNEIGH = 28

_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_NEIGHBOUR = struct.Struct("=BxxxiHBB")

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU = 1, 3, 4
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST, _IFA_FLAGS = 1, 2, 4, 8
_NDA_DST, _NDA_LLADDR = 1, 2

_ARPHRD_ETHER = 1
_IFF_UP, _IFF_LOOPBACK = 1, 8
_SCOPE_LINK = 253
_NODAD, _PERMANENT, _NOPREFIXROUTE = 0x02, 0x80, 0x200
_NEIGHBOUR_STATES = {"": 0x80, "permanent": 0x80, "noarp": 0x40}

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@=+-]{0,14}")
_SYSCTL = re.compile(r"ipv[46]/[a-z0-9_]+")
_DRIVER = "bus/virtio/drivers/virtio_net"
#: seconds that a hot-plugged interface may take to appear
TIMEOUT = 20.0


class Link(NamedTuple):
    number: int
    name: str
    mac: str
    mtu: int
    flags: int


class Network:
    """The guest's interfaces.  Methods raise an `AgentError`."""

    def __init__(
        self,
        *,
        sys: Path = Path("/sys"),
        proc_sys: Path = Path("/proc/sys"),
        subscribe: Callable[[], devices.Uevents] = devices.Uevents,
    ) -> None:
        self._sys = sys
        self._proc_sys = proc_sys
        self._subscribe = subscribe
        #: devices that have no driver, because they were no interface when the pod started
        self._away: set[str] = set()

    def configure(
        self,
        interfaces: Iterable[pb.Interface],
        paths: Iterable[pb.Route],
        neighbours: Iterable[pb.Neighbour],
    ) -> None:
        """Everything at once, as a pod starts; one without interfaces has the loopback only."""
        described, wanted, known = list(interfaces), list(paths), list(neighbours)
        if not described:
            self._put_away()
        if described or wanted:
            with Rtnetlink() as kernel:
                for interface in described:
                    self._set_up(kernel, interface, TIMEOUT)
                if wanted:
                    routes.update(kernel, wanted, self._indices(kernel))
        if known:
            self.add_neighbours(known)

    def _put_away(self) -> None:
        """Have the driver let go of the cards that the machine has had from its start: nothing is seen of them."""
        driver = self._sys / _DRIVER
        for name in (each for each in _names(driver) if each.startswith("virtio")):
            _tell_driver(driver / "unbind", name)
            self._away.add(name)

    def start_again(self) -> None:
        """Have the cards be as the kernel found them: no interface keeps anything that it was given."""
        self._put_away()
        for name in sorted(self._away):
            _tell_driver(self._sys / _DRIVER / "bind", name)
        self._away.clear()

    def _take_out(self, pci_path: str) -> None:
        """Have the driver take back what is at a place."""
        directory = devices.pci_directory(pci_path, self._sys)
        for name in sorted(self._away):
            if directory is not None and (directory / name).exists():
                _tell_driver(self._sys / _DRIVER / "bind", name)
                self._away.discard(name)

    # ------------------------------------------------------------ interfaces

    def update_interface(self, wanted: pb.Interface, *, timeout: float = TIMEOUT) -> pb.Interface:
        """Find a device, waiting for one that is being plugged in, and make it what is wanted; answers what it is."""
        with Rtnetlink() as kernel:
            name = self._set_up(kernel, wanted, timeout)
            return next(each for each in self._interfaces(kernel) if each.name == name)

    def _set_up(self, kernel: Rtnetlink, wanted: pb.Interface, timeout: float) -> str:
        """The same without an answer; under what name it is."""
        _check_interface(wanted)
        if self._away and wanted.pci_path:
            self._take_out(wanted.pci_path)
        link = self._awaited(kernel, wanted, timeout)
        try:
            self._apply(kernel, link, wanted)
        except OSError as error:
            raise refused(f"cannot set up interface '{wanted.name or link.name}'", error) from error
        return wanted.name or link.name

    def _apply(self, kernel: Rtnetlink, link: Link, wanted: pb.Interface) -> None:
        name = wanted.name or link.name
        if name != link.name:
            _make_room(kernel, name)
            # Under its old name it must be down: not every kernel renames what is up.
            _set_link(kernel, link.number, up=False)
            _set_link(kernel, link.number, attributes=[(_IFLA_IFNAME, name)])
        if wanted.mac and wanted.mac != link.mac:
            _set_link(kernel, link.number, attributes=[(_IFLA_ADDRESS, inet.mac(wanted.mac))])
        if wanted.mtu and wanted.mtu != link.mtu:
            _set_link(kernel, link.number, attributes=[(_IFLA_MTU, wanted.mtu)])
        for key, value in wanted.sysctls.items():
            self._set_sysctl(name, key, value)
        # First up, so that IPv6 addresses are not lost to a link that comes up behind them.
        if wanted.up:
            _set_link(kernel, link.number, up=True)
        _set_addresses(kernel, link.number, wanted.addresses)
        if not wanted.up:
            _set_link(kernel, link.number, up=False)

    def _awaited(self, kernel: Rtnetlink, wanted: pb.Interface, timeout: float) -> Link:
        place = f"interface at '{wanted.pci_path}'" if wanted.pci_path else f"interface '{wanted.mac or wanted.name}'"
        return devices.wait_for(lambda: self._find(kernel, wanted), place, timeout=timeout, subscribe=self._subscribe)

    def _find(self, kernel: Rtnetlink, wanted: pb.Interface) -> Link | None:
        names = self._names_at(wanted.pci_path) if wanted.pci_path else None
        for link in _links(kernel):
            if names is not None:
                if link.name in names:
                    return link
            elif link.mac == wanted.mac if wanted.mac else link.name == wanted.name:
                return link
        return None

    def _names_at(self, pci_path: str) -> set[str]:
        """What the kernel calls the interface of the device at a place."""
        directory = devices.pci_directory(pci_path, self._sys)
        if directory is None:
            return set()
        # Patterns would be compiled, which takes an emulated guest longer than all the rest.
        devices_below = [directory, *(directory / name for name in _names(directory) if name.startswith("virtio"))]
        return {name for device in devices_below for name in _names(device / "net")}

    def _set_sysctl(self, name: str, key: str, value: str) -> None:
        family, _, setting = key.partition("/")
        path = self._proc_sys / "net" / family / "conf" / name / setting
        try:
            path.write_text(value)
        except FileNotFoundError:
            return  # a kernel without that family has nothing to be told
        except OSError as error:
            raise refused(f"cannot set '{key}' of interface '{name}' to '{value}'", error) from error

    def remove_interface(self, name: str) -> None:
        """Take an interface out of use, before its device is unplugged."""
        with Rtnetlink() as kernel:
            link = _named(kernel, name)
            try:
                _set_addresses(kernel, link.number, ())
                _set_link(kernel, link.number, up=False)
            except OSError as error:
                raise refused(f"cannot take down interface '{name}'", error) from error

    def interfaces(self) -> list[pb.Interface]:
        """All but the loopback."""
        with Rtnetlink() as kernel:
            return self._interfaces(kernel)

    def _interfaces(self, kernel: Rtnetlink) -> list[pb.Interface]:
        addresses: dict[int, list[pb.IpAddress]] = {}
        for _, prefix, _, _, index, local, peer in _addresses(kernel):
            described = pb.IpAddress(address=inet.text(local), prefix=prefix)
            if peer and peer != local:
                described.peer = inet.text(peer)
            addresses.setdefault(index, []).append(described)
        places = self._places()
        return [
            pb.Interface(
                name=link.name,
                mac=link.mac,
                mtu=link.mtu,
                up=bool(link.flags & _IFF_UP),
                addresses=addresses.get(link.number, ()),
                pci_path=places.get(link.name, ""),
            )
            for link in _links(kernel)
        ]

    def _places(self) -> dict[str, str]:
        """The place on the bus of each interface that has one."""
        found = {}
        try:
            names = os.listdir(self._sys / "class/net")
        except OSError:
            return {}
        for name in names:
            parts = os.path.realpath(self._sys / "class/net" / name).split("/")
            slots = [part for part in parts if re.fullmatch(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", part)]
            if slots:
                found[name] = "/".join(slot[8:] for slot in slots)
        return found

    # ------------------------------------------------------------ routes and neighbours

    def update_routes(self, wanted: Iterable[pb.Route]) -> list[pb.Route]:
        """Make the main table exactly this and say what it is; if the kernel refuses one, it stays as it was."""
        with Rtnetlink() as kernel:
            links = self._indices(kernel)
            routes.update(kernel, list(wanted), links)
            return routes.described(kernel, links)

    def routes(self) -> list[pb.Route]:
        """The main table."""
        with Rtnetlink() as kernel:
            return routes.described(kernel, self._indices(kernel))

    @staticmethod
    def _indices(kernel: Rtnetlink) -> dict[str, int]:
        return {link.name: link.number for link in _links(kernel, loopback=True)}

    def add_neighbours(self, neighbours: Iterable[pb.Neighbour]) -> None:
        """Set neighbours that need not be asked for."""
        with Rtnetlink() as kernel:
            for each in neighbours:
                state = _NEIGHBOUR_STATES.get(each.state)
                if state is None:
                    raise InvalidArgumentError(f"'{each.state[:64]}' is not a state of a neighbour here")
                family, packed = inet.packed(each.address)
                head = _NEIGHBOUR.pack(family, _named(kernel, each.interface).number, state, 0, 0)
                content: list[Attribute] = [(_NDA_DST, packed), (_NDA_LLADDR, inet.mac(each.mac))]
                try:
                    kernel.change(_NEWNEIGH, head, content, flags=CREATE | REPLACE)
                except OSError as error:
                    raise refused(f"cannot add neighbour '{each.address}'", error) from error


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _tell_driver(file: Path, device: str) -> None:
    try:
        file.write_text(device)
    except OSError as error:
        raise refused(f"cannot {file.name} the driver of network card '{device}'", error) from error


def _check_interface(wanted: pb.Interface) -> None:
    if not (wanted.pci_path or wanted.mac or wanted.name):
        raise InvalidArgumentError("an interface is named by its place, its MAC address or its name")
    if wanted.name and not _NAME.fullmatch(wanted.name):
        raise InvalidArgumentError(f"'{wanted.name[:64]}' is not a name of an interface")
    if wanted.mac:
        inet.mac(wanted.mac)
    for key in wanted.sysctls:
        if not _SYSCTL.fullmatch(key):
            raise InvalidArgumentError(f"'{key[:64]}' is not a setting of an interface: it is like 'ipv6/accept_ra'")
    for each in wanted.addresses:
        _checked_address(each)


def _checked_address(each: pb.IpAddress) -> tuple[int, bytes]:
    family, packed = inet.packed(each.address)
    if each.prefix > len(packed) * 8:
        raise InvalidArgumentError(f"address '{each.address}' cannot have a prefix of {each.prefix} bits")
    return family, packed


# ---------------------------------------------------------------- links and addresses


def _links(kernel: Rtnetlink, *, loopback: bool = False) -> list[Link]:
    found = []
    for head, attributes in kernel.dump(_GETLINK, _LINK.pack(0, 0, 0, 0, 0), _LINK.size):
        _, kind, index, flags, _ = _LINK.unpack(head)
        if (kind == _ARPHRD_ETHER and not flags & _IFF_LOOPBACK) or (loopback and flags & _IFF_LOOPBACK):
            name = attributes[_IFLA_IFNAME].rstrip(b"\0").decode()
            mac = ":".join(f"{byte:02x}" for byte in attributes.get(_IFLA_ADDRESS, b""))
            found.append(Link(index, name, mac, int.from_bytes(attributes[_IFLA_MTU], "little"), flags))
    return found


def _named(kernel: Rtnetlink, name: str) -> Link:
    for link in _links(kernel):
        if link.name == name:
            return link
    raise NotFoundError(f"the guest has no interface '{name[:64]}'")


def _make_room(kernel: Rtnetlink, name: str) -> None:
    """Rename the interface that the kernel gave a name somebody else shall have; its own turn comes."""
    for link in _links(kernel):
        if link.name == name:
            _set_link(kernel, link.number, up=False)
            _set_link(kernel, link.number, attributes=[(_IFLA_IFNAME, f"unnamed{link.number}")])


def _set_link(kernel: Rtnetlink, index: int, *, up: bool | None = None, attributes: Iterable[Attribute] = ()) -> None:
    change = 0 if up is None else _IFF_UP
    kernel.change(_SETLINK, _LINK.pack(0, 0, index, _IFF_UP if up else 0, change), [*attributes])


def _addresses(kernel: Rtnetlink) -> list[tuple[int, int, int, int, int, bytes, bytes]]:
    """Family, prefix, flags, scope, index, address and peer of each."""
    found = []
    for head, attributes in kernel.dump(_GETADDR, _ADDRESS.pack(0, 0, 0, 0, 0), _ADDRESS.size):
        family, prefix, flags, scope, index = _ADDRESS.unpack(head)
        peer = attributes.get(_IFA_ADDRESS, b"")
        local = attributes.get(_IFA_LOCAL, peer)
        flags = int.from_bytes(attributes.get(_IFA_FLAGS, bytes([flags])), "little")
        if family in (socket.AF_INET, socket.AF_INET6) and local:
            found.append((family, prefix, flags, scope, index, local, peer))
    return found


def _set_addresses(kernel: Rtnetlink, index: int, addresses: Iterable[pb.IpAddress]) -> None:
    """Give an interface these addresses and no others; its own link-local one stays."""
    wanted = {_identity(each): each for each in addresses}
    present = _present(kernel, index)
    stale = False
    for identity, scope in present:
        family, prefix, local, peer = identity
        if identity in wanted or (family == socket.AF_INET6 and scope == _SCOPE_LINK):
            continue
        try:
            head = _ADDRESS.pack(family, prefix, 0, 0, index)
            stale = True
            kernel.change(_DELADDR, head, [(_IFA_LOCAL, local), (_IFA_ADDRESS, peer)])
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # it went with the first address of its network
                raise
    # With an address others may have gone, or come.
    there = {identity for identity, _ in (_present(kernel, index) if stale else present)}
    for identity, each in wanted.items():
        if identity in there:
            continue
        family, prefix, local, peer = identity
        # Nobody else has it: the host's engine gave it to this pod.
        flags = _PERMANENT | _NODAD | (_NOPREFIXROUTE if each.no_prefix_route else 0)
        content: list[Attribute] = [(_IFA_LOCAL, local), (_IFA_ADDRESS, peer), (_IFA_FLAGS, flags)]
        if family == socket.AF_INET and local == peer and prefix < 31:
            content.append((_IFA_BROADCAST, inet.broadcast(local, prefix)))
        head = _ADDRESS.pack(family, prefix, flags & 0xFF, 0, index)
        kernel.change(_NEWADDR, head, content, flags=CREATE | EXCLUSIVE)


def _identity(each: pb.IpAddress) -> tuple[int, int, bytes, bytes]:
    """Family, prefix, address and peer (itself where there is none)."""
    family, local = _checked_address(each)
    return family, each.prefix, local, inet.packed(each.peer)[1] if each.peer else local


def _present(kernel: Rtnetlink, index: int) -> list[tuple[tuple[int, int, bytes, bytes], int]]:
    """The identities and scopes of an interface's addresses."""
    return [
        ((family, prefix, local, peer or local), scope)
        for family, prefix, _, scope, at, local, peer in _addresses(kernel)
        if at == index
    ]
