"""The default network: one bridge on the host that all pods without another network are on.

It is described by a configuration list that is written at first use, with a range of addresses that nothing on the host
leads to, and may be edited afterwards.  The bridge itself comes with the first pod and goes with the last.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import ipaddress
import json
import os
import socket
import struct
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from vmsandbox import locks
from vmsandbox.errors import AlreadyExistsError, ExhaustedError, InvalidArgumentError
from vmsandbox.resources.network import cni

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from vmsandbox.paths import Roots

NAME = "vmsandbox"
#: programs that make the network
PLUGINS = ("bridge", "host-local", "portmap", "firewall")
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCBRDELBR, _SIOCDEVPRIVATE = 0x8913, 0x8914, 0x89A1, 0x89F0
_BRCTL_GET_PORT_LIST, _MOST_PORTS = 7, 1024
_IFF_UP = 1
#: from what is rarely used to what often is; 10.88 and 10.89 are podman's, 172.17 and on docker's
_CANDIDATES = (
    *(f"10.{number}.0.0/16" for number in (*range(90, 255), *range(64, 88))),
    *(f"192.168.{number}.0/24" for number in range(120, 255)),
    *(f"172.{number}.0.0/16" for number in range(31, 15, -1)),
)
#: what an entry of the host's routing table is: a way to others, or an address of its own
_OWN_KINDS = {"UNICAST", "LOCAL"}
#: this network, loopback, link-local, multicast, reserved and broadcast
_NOT_HOSTS = ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")
#: longest prefixes of networks with room for a gateway and a pod
_LONGEST = {4: 30, 6: 126}
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Bridge:
    """The default network of a data root."""

    def __init__(self, roots: Roots, *, proc: str = "/proc") -> None:
        self.directory: Path = roots.data / "network"
        self._proc = proc

    @property
    def file(self) -> Path:
        """The configuration list; who edits it while no pod is on the network changes the network."""
        return self.directory / f"{NAME}.conflist"

    @property
    def leases(self) -> Path:
        return self.directory / "leases"

    def names(self) -> Path:
        """Where pods say what they are called."""
        return self.directory / "names"

    # ------------------------------------------------------------ configuration

    def network(self, *, subnet: str = "", ipv6: bool = False) -> dict[str, Any]:
        """The configuration list, written if there is none, or if its range has become somebody else's meanwhile.

        Raises ExhaustedError if no private range is free, InvalidArgumentError for a `subnet` that cannot be used and a
        file that is none of a network.
        """
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._forget_last_boot()
        try:
            found = _checked(json.loads(self.file.read_text()), str(self.file))
        except FileNotFoundError:
            return self._written(subnet, ipv6=ipv6)
        except (ValueError, OSError) as error:
            raise InvalidArgumentError(f"'{self.file}' is not a network: {error}") from error
        written = found.get("vmsandbox")
        ours = written is not None and {"subnet": subnet, "ipv6": ipv6} != written
        if not self.exists(bridge_of(found)) and (ours or self._collides(found)) and written is not None:
            return self._written(subnet, ipv6=ipv6)
        for own in subnets_of(found):
            _roomy(own)
        return found

    def _written(self, subnet: str, *, ipv6: bool) -> dict[str, Any]:
        ranges = [[{"subnet": str(self._usable(subnet) if subnet else self.free_range())}]]
        routes = [{"dst": "0.0.0.0/0"}]
        if ipv6:
            ranges.append([{"subnet": str(unique_local())}])
            routes.append({"dst": "::/0"})
        bridge = next(name for number in range(1000) if not self.exists(name := f"{NAME}{number}"))
        document = {
            "cniVersion": cni.VERSION,
            "name": NAME,
            # What of the settings it was made of: with others it is made again.
            "vmsandbox": {"subnet": subnet, "ipv6": ipv6},
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": bridge,
                    "isGateway": True,
                    "ipMasq": True,
                    "hairpinMode": True,
                    "ipam": {
                        "type": "host-local",
                        "ranges": ranges,
                        "routes": routes,
                        "dataDir": str(self.leases),
                    },
                    "capabilities": {"ips": True},
                },
                {"type": "portmap", "snat": True, "capabilities": {"portMappings": True}},
                {"type": "firewall"},
            ],
        }
        temporary = self.file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(document, indent=2) + "\n")
        temporary.rename(self.file)
        return document

    def _usable(self, subnet: str) -> ipaddress.IPv4Network:
        """The range that somebody chose; refused where it is not one of hosts, or the host itself uses some of it."""
        chosen = _network(subnet)
        if not isinstance(chosen, ipaddress.IPv4Network):
            raise InvalidArgumentError(
                f"'network.subnet' is '{subnet}': it needs a range of IPv4 ('network.ipv6' adds one)"
            )
        _roomy(chosen)
        if any(chosen.overlaps(ipaddress.IPv4Network(text)) for text in _NOT_HOSTS):
            raise InvalidArgumentError(f"'network.subnet' is '{subnet}': hosts cannot have all of these addresses")
        for taken in self.taken():
            if chosen.overlaps(taken):
                raise InvalidArgumentError(
                    f"'network.subnet' is '{subnet}': the host uses '{taken}'; choose another, or none"
                )
        return chosen

    def free_range(self) -> ipaddress.IPv4Network:
        """A private range that no route of the host leads into."""
        taken = self.taken()
        for text in _CANDIDATES:
            candidate = ipaddress.IPv4Network(text)
            if not any(candidate.overlaps(network) for network in taken):
                return candidate
        raise ExhaustedError("no private range of addresses is free: set 'network.subnet' to one")

    def taken(self) -> list[ipaddress.IPv4Network]:
        """What the host's addresses, routes and name servers use, in any table; default routes aside."""
        found = []
        address = ""
        for line in _lines(f"{self._proc}/net/fib_trie"):
            words = line.split()
            if words[:1] == ["|--"]:
                address = words[1]
            elif words and words[0].startswith("/") and not _OWN_KINDS.isdisjoint(words):
                found.append(ipaddress.IPv4Network(f"{address}{words[0]}", strict=False))
        for line in _lines("/etc/resolv.conf"):
            words = line.split()
            if words[:1] == ["nameserver"] and len(words) > 1:
                with suppress(ValueError):
                    found.append(ipaddress.IPv4Network(words[1]))
        return [network for network in found if network.prefixlen]

    def _collides(self, document: dict[str, Any]) -> bool:
        taken = self.taken()
        return any(
            isinstance(own, ipaddress.IPv4Network) and own.overlaps(other)
            for own in subnets_of(document)
            for other in taken
        )

    @staticmethod
    def exists(bridge: str) -> bool:
        """Whether the host has it; by a system call, because /sys shows the network it was mounted in."""
        try:
            return socket.if_nametoindex(bridge) > 0
        except OSError:
            return False

    def _forget_last_boot(self) -> None:
        """Leases and names of pods that a reboot ended."""
        boot = "".join(_lines(f"{self._proc}/sys/kernel/random/boot_id")).strip()
        marker = self.directory / "boot"
        if "".join(_lines(str(marker))) == boot:
            return
        for directory in (self.leases / NAME, self.names()):
            for entry in sorted(directory.glob("*")) if directory.is_dir() else ():
                entry.unlink()
        marker.write_text(boot)

    # ------------------------------------------------------------ pods

    def check_address(self, document: dict[str, Any], ip: str) -> str:
        """An address that a pod wants, with its prefix length as plugins take it."""
        address = ipaddress.ip_address(ip)
        for network in subnets_of(document):
            if address in network:
                lease = self.leases / NAME / str(address)
                if lease.exists():
                    raise AlreadyExistsError(
                        f"address '{ip}' is in use by another pod: choose another, or leave out '--ip'"
                    )
                if address in (network.network_address, network.network_address + 1, network.broadcast_address):
                    raise InvalidArgumentError(
                        f"address '{ip}' belongs to the network itself: choose another, or leave out '--ip'"
                    )
                return f"{address}/{network.prefixlen}"
        shown = ", ".join(str(network) for network in subnets_of(document))
        raise InvalidArgumentError(f"address '{ip}' is not of the default network, which is {shown}")

    def leased(self, attachment: cni.Attachment) -> dict[str, Any]:
        """What `cni.add` would have answered, as far as addresses go, for a pod whose maker was killed within it."""
        addresses = []
        directory = self.leases / str(attachment.network["name"])
        for network in subnets_of(dict(attachment.network)):
            for lease in sorted(directory.glob("*")):
                with suppress(ValueError, OSError):
                    address = ipaddress.ip_address(lease.name)
                    if address in network and lease.read_text().split()[:1] == [attachment.container_id]:
                        addresses.append({"address": f"{address}/{network.prefixlen}", "interface": 0})
        if not addresses:
            return {}
        interface = {"name": attachment.interface, "sandbox": attachment.netns}
        return {"cniVersion": attachment.network["cniVersion"], "interfaces": [interface], "ips": addresses}

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[None]:
        """Nobody removes the bridge, or writes the network anew, within the block."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locks.opened(self.directory / "lock") as lock:
            await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_SH)
            yield

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        try:
            lock = locks.opened(self.directory / "lock")
        except FileNotFoundError:
            yield False
            return
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False  # somebody is just using it
                return
            yield True

    def prepare(self, *, subnet: str = "", ipv6: bool = False) -> dict[str, Any]:
        """`network`, one process at a time."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locks.opened(self.directory / "writing") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self.network(subnet=subnet, ipv6=ipv6)

    def remove_if_unused(self) -> bool:
        """Remove the bridge when no pod is on it; says whether it did."""
        with self._alone() as alone:
            if not alone:
                return False
            try:
                bridge = bridge_of(_checked(json.loads(self.file.read_text()), str(self.file)))
            except (OSError, ValueError, InvalidArgumentError):
                return False
            return self.exists(bridge) and _deleted(bridge)


def bridge_of(document: dict[str, Any]) -> str:
    return next((str(plugin.get("bridge", "")) for plugin in document["plugins"] if plugin.get("type") == "bridge"), "")


def subnets_of(document: dict[str, Any]) -> list[_Network]:
    """The ranges of a network's addresses."""
    found: list[_Network] = []
    for plugin in document["plugins"]:
        ipam = plugin.get("ipam") or {}
        ranges = [each for group in ipam.get("ranges") or [] for each in group]
        if "subnet" in ipam:
            ranges.append(ipam)
        found += [_network(str(each["subnet"])) for each in ranges if "subnet" in each]
    return found


def unique_local() -> ipaddress.IPv6Network:
    """A random network for private use (RFC 4193)."""
    return ipaddress.IPv6Network((b"\xfd" + os.urandom(5) + bytes(10), 64))


def _checked(document: Any, file: str) -> dict[str, Any]:  # noqa: ANN401
    plugins = document.get("plugins") if isinstance(document, dict) else None
    good = isinstance(plugins, list) and plugins and all(isinstance(plugin, dict) for plugin in plugins)
    if not good or not isinstance(document.get("name"), str) or not isinstance(document.get("cniVersion"), str):
        raise InvalidArgumentError(f"'{file}' is not a list of network plugins: remove it, and it is written again")
    made: dict[str, Any] = document
    return made


def _network(text: str) -> _Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise InvalidArgumentError(f"'{text}' is not a network: {error}") from error


def _roomy(network: _Network) -> None:
    if network.prefixlen > _LONGEST[network.version]:
        raise InvalidArgumentError(f"network '{network}' is too small: it needs room for a gateway and a pod")


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().splitlines()
    except OSError:
        return []


def _deleted(name: str) -> bool:
    """Delete a bridge that has no ports; says whether it is gone."""
    indices = (ctypes.c_int * _MOST_PORTS)()
    arguments = (ctypes.c_ulong * 4)(_BRCTL_GET_PORT_LIST, ctypes.addressof(indices), _MOST_PORTS, 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            query = struct.pack("16sQ16x", name.encode(), ctypes.addressof(arguments))
            fcntl.ioctl(sock, _SIOCDEVPRIVATE, bytearray(query))
            if any(indices):
                return False
            found = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16sH22x", name.encode(), 0))
            flags = struct.unpack_from("16sH", found)[1] & ~_IFF_UP
            fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), flags))
            fcntl.ioctl(sock, _SIOCBRDELBR, struct.pack("16s", name.encode()))
        except OSError:
            return False  # it is no bridge, or went just now
    return True
