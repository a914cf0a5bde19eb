"""Links, addresses, routes, neighbours and filters of the network namespace this process is in; by pyroute2.

Of pyroute2 only the messages are used: its package imports everything it has, asyncio included, which takes several
times as long as all the work done here.  `_bare_pyroute2` puts an empty package in its place, so that its submodules
can be imported one by one.  So nothing else may use pyroute2 in a process that imports this module: `helper`, and the
nursery, which supervisors and then helpers are forked from.

Filters of ours are recognised by their priority, taps by their name and alias.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
import struct
import sys
import types
from typing import TYPE_CHECKING, Any, NamedTuple


def _bare_pyroute2() -> None:
    if "pyroute2" in sys.modules:
        return
    found = importlib.util.find_spec("pyroute2")
    if found is None or found.submodule_search_locations is None:
        raise ImportError("pyroute2 is not installed")
    package = types.ModuleType("pyroute2")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["pyroute2"] = package


_bare_pyroute2()

from pyroute2.netlink import nla, nlmsg  # noqa: E402
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg  # noqa: E402
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg  # noqa: E402
from pyroute2.netlink.rtnl.ndmsg import ndmsg  # noqa: E402
from pyroute2.netlink.rtnl.rtmsg import rtmsg  # noqa: E402

from vmsandbox.resources.network import answers  # noqa: E402
from vmsandbox.resources.network.answers import TAP_ALIAS, TAP_PREFIX  # noqa: E402
from vmsandbox.resources.network.model import Address, Endpoint, Neighbour, Route  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

#: the check has this priority, the redirection behind it the next
PRIORITY = 0x7600

_NEWLINK, _DELLINK, _GETLINK, _SETLINK = 16, 17, 18, 19
_GETADDR, _GETROUTE, _GETNEIGH = 22, 26, 30
_NEWQDISC, _DELQDISC, _GETQDISC = 36, 37, 38
_NEWTFILTER, _DELTFILTER, _GETTFILTER = 44, 45, 46
_REQUEST, _ACK, _EXCL, _CREATE, _DUMP = 0x1, 0x4, 0x200, 0x400, 0x300
_ERROR, _DONE = 2, 3
_DUMP_INTERRUPTED = 0x10
_ACK_TLVS, _CAPPED = 0x200, 0x100
_SOL_NETLINK, _NETLINK_EXT_ACK = 270, 11

_IFF_UP, _IFF_NOARP = 0x1, 0x80
_TABLE_MAIN = 254
_INGRESS_HANDLE, _INGRESS_PARENT = 0xFFFF0000, 0xFFFFFFF1
#: names the ingress side both of an ingress and of a clsact queueing discipline
_INGRESS_BLOCK = 0xFFFFFFF2
_MIRRED_EGRESS_REDIRECT = 1
_TC_ACT_STOLEN = 4
_BPF_DIRECT_ACTION = 1
_ETH_P_ALL = 3
#: a struct tc_u32_sel with one word that matches anything and ends the search
_SELECT_ALL = struct.pack("=BBBxHHhhIIIii", 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)
_MOST_ROUTES = 20_000


class _Mirred(nla):  # type: ignore[misc]
    nla_flags = 0x8000
    nla_map = (("UNSPEC", "none"), ("TM", "none"), ("PARMS", "cdata"))


class _Action(nla):  # type: ignore[misc]
    nla_map = (("UNSPEC", "none"), ("KIND", "asciiz"), ("OPTIONS", "mirred"))
    mirred = _Mirred


class _Actions(nla):  # type: ignore[misc]
    nla_map = (("PRIO_0", "none"), ("PRIO_1", "action"))
    action = _Action


class _U32(nla):  # type: ignore[misc]
    nla_map = (
        ("UNSPEC", "none"),
        ("CLASSID", "uint32"),
        ("HASH", "uint32"),
        ("LINK", "uint32"),
        ("DIVISOR", "uint32"),
        ("SEL", "cdata"),
        ("POLICE", "hex"),
        ("ACT", "actions"),
    )
    actions = _Actions


class _Bpf(nla):  # type: ignore[misc]
    nla_map = (
        ("UNSPEC", "none"),
        ("ACT", "hex"),
        ("POLICE", "hex"),
        ("CLASSID", "uint32"),
        ("OPS_LEN", "uint16"),
        ("OPS", "cdata"),
        ("FD", "uint32"),
        ("NAME", "asciiz"),
        ("FLAGS", "uint32"),
    )


def _options_class(message: Any, *_args: Any, **_arguments: Any) -> type:
    return {"u32": _U32, "bpf": _Bpf}.get(message.get_attr("TCA_KIND"), message.hex)  # type: ignore[no-any-return]


class _TcMessage(nlmsg):  # type: ignore[misc]
    """pyroute2's own imports every discipline there is."""

    fields = (
        ("family", "B"),
        ("pad1", "B"),
        ("pad2", "H"),
        ("index", "i"),
        ("handle", "I"),
        ("parent", "I"),
        ("info", "I"),
    )
    nla_map = (("TCA_UNSPEC", "none"), ("TCA_KIND", "asciiz"), ("TCA_OPTIONS", "options"))
    options = staticmethod(_options_class)


class Tap(NamedTuple):
    """A tap that somebody holds open."""

    name: str
    number: int
    owner: str


class Kernel:
    """A netlink conversation in the namespace the process was in when it began."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    # ------------------------------------------------------------ conversation

    def change(self, message: Any, kind: int, flags: int = 0) -> None:
        """Send one request and wait for its acknowledgement; OSError with the kernel's reason."""
        for _ in self._exchange(message, kind, flags | _REQUEST | _ACK):
            pass

    def dump(self, message: Any, kind: int) -> list[Any]:
        """All objects of a kind, decoded; taken again while they change meanwhile."""
        while True:
            try:
                return list(self._exchange(message, kind, _REQUEST | _DUMP))
            except InterruptedError:
                message.reset()

    def _dump_families(self, kind: type[Any], number: int) -> Iterator[Any]:
        for family in (socket.AF_INET, socket.AF_INET6):
            message = kind()
            message["family"] = family
            yield from self.dump(message, number)

    def _exchange(self, message: Any, kind: int, flags: int) -> Iterator[Any]:
        self._sequence += 1
        message["header"] = {"type": kind, "flags": flags, "sequence_number": self._sequence, "pid": 0}
        message.encode()
        self._socket.sendto(message.data, (0, 0))
        interrupted = False
        while True:
            data = bytearray(self._socket.recv(1 << 20))
            offset = 0
            while offset + 16 <= len(data):
                length, found, marks, sequence, _ = struct.unpack_from("IHHII", data, offset)
                if sequence == self._sequence:
                    interrupted |= bool(marks & _DUMP_INTERRUPTED)
                    if found == _DONE:
                        if interrupted:
                            raise InterruptedError
                        return
                    if found == _ERROR:
                        _raise_failure(data[offset : offset + length], marks)
                        return
                    answer = type(message)(data[offset : offset + length])
                    answer.decode()
                    yield answer
                offset += length + 3 & ~3

    # ------------------------------------------------------------ looking

    def links(self) -> list[Any]:
        return self.dump(ifinfmsg(), _GETLINK)

    def endpoints(self) -> list[Endpoint]:
        """Every Ethernet-like interface that is up or has addresses; taps of ours are none."""
        links = [link for link in self.links() if answers.is_endpoint(link)]
        addresses: dict[int, list[Address]] = {}
        for message in self.dump(ifaddrmsg(), _GETADDR):
            address = answers.address(message)
            if address is not None:
                addresses.setdefault(message["index"], []).append(address)
        links = [link for link in links if link["flags"] & _IFF_UP or link["index"] in addresses]
        if not links:
            return []
        routes = self._routes(links[0]["index"])
        neighbours: dict[int, list[Neighbour]] = {}
        for message in self._dump_families(ndmsg, _GETNEIGH):
            neighbour = answers.neighbour(message)
            if neighbour is not None:
                neighbours.setdefault(message["ifindex"], []).append(neighbour)
        return [
            answers.with_own_link_local(
                Endpoint(
                    name=link.get_attr("IFLA_IFNAME"),
                    mac=link.get_attr("IFLA_ADDRESS"),
                    mtu=link.get_attr("IFLA_MTU"),
                    index=link["index"],
                    up=bool(link["flags"] & _IFF_UP),
                    kind=answers.kind(link),
                    addresses=tuple(addresses.get(link["index"], ())),
                    routes=tuple(routes.get(link["index"], ())),
                    neighbours=tuple(neighbours.get(link["index"], ())),
                    sysctls=answers.sysctls(link.get_attr("IFLA_IFNAME")),
                )
            )
            for link in links
        ]

    def _routes(self, first: int) -> dict[int, list[Route]]:
        """Routes of the main table by interface; those that lead nowhere go with the `first` one."""
        found: dict[int, list[Route]] = {}
        count = 0
        for message in self._dump_families(rtmsg, _GETROUTE):
            if message["table"] != _TABLE_MAIN or message.get_attr("RTA_TABLE") not in (None, _TABLE_MAIN):
                continue
            for index, route in answers.next_hops(message):
                count += 1
                if count > _MOST_ROUTES:
                    raise OSError(errno.E2BIG, f"the namespace has more than {_MOST_ROUTES} routes")
                found.setdefault(index or first, []).append(route)
        return found

    # ------------------------------------------------------------ changing

    def set_up_tap(self, name: str, *, mtu: int, alias: str) -> int:
        """Give a new tap its size and mark, and keep the namespace's own stack off it; returns its index."""
        index = socket.if_nametoindex(name)
        message = ifinfmsg()
        message["index"] = index
        message["flags"] = message["change"] = _IFF_NOARP
        message["attrs"] = [["IFLA_MTU", mtu], ["IFLA_IFALIAS", TAP_ALIAS + alias]]
        self.change(message, _SETLINK)
        _write_sysctl("ipv6", name, "disable_ipv6", "1")
        return index

    def set_up(self, index: int) -> None:
        message = ifinfmsg()
        message["index"] = index
        message["flags"] = message["change"] = _IFF_UP
        self.change(message, _SETLINK)

    def move(self, index: int, namespace: int, name: str) -> None:
        """Put a link into another namespace, under another name."""
        message = ifinfmsg()
        message["index"] = index
        message["attrs"] = [["IFLA_NET_NS_FD", namespace], ["IFLA_IFNAME", name]]
        self.change(message, _SETLINK)

    def delete_link(self, index: int) -> None:
        message = ifinfmsg()
        message["index"] = index
        try:
            self.change(message, _DELLINK)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise

    def check(self, source: int, program: bytes) -> None:
        """Let a classic BPF program say which of the frames that arrive at `source` go on to the next filter."""
        self._add_ingress(source)
        options = [["OPS_LEN", len(program) // 8], ["OPS", program], ["FLAGS", _BPF_DIRECT_ACTION]]
        self._add_filter(source, PRIORITY, "bpf", options)

    def redirect(self, source: int, target: int) -> None:
        """Send all frames that arrive at `source` out of `target`."""
        self._add_ingress(source)
        mirred = struct.pack("=IIiiiiI", 0, 0, _TC_ACT_STOLEN, 0, 0, _MIRRED_EGRESS_REDIRECT, target)
        action = {"attrs": [["KIND", "mirred"], ["OPTIONS", {"attrs": [["PARMS", mirred]]}]]}
        options = [["SEL", _SELECT_ALL], ["ACT", {"attrs": [["PRIO_1", action]]}]]
        self._add_filter(source, PRIORITY + 1, "u32", options)

    def _add_filter(self, source: int, priority: int, kind: str, options: list[Any]) -> None:
        message = _tc(source)
        message["parent"] = _INGRESS_BLOCK
        message["info"] = priority << 16 | socket.htons(_ETH_P_ALL)
        message["attrs"] = [["TCA_KIND", kind], ["TCA_OPTIONS", {"attrs": options}]]
        self.change(message, _NEWTFILTER, _CREATE | _EXCL)

    def _add_ingress(self, index: int) -> None:
        message = _TcMessage()
        message["index"] = index
        message["handle"] = _INGRESS_HANDLE
        message["parent"] = _INGRESS_PARENT
        message["attrs"] = [["TCA_KIND", "ingress"]]
        try:
            self.change(message, _NEWQDISC, _CREATE | _EXCL)
        except OSError as error:
            if error.errno != errno.EEXIST:  # somebody's own filters: ours go behind them
                raise

    def clear(self, index: int) -> bool:
        """Remove filters of ours from an interface, and the ingress discipline if it serves nothing else.

        Says whether there was anything; an interface that is gone is fine.
        """
        disciplines = [
            message.get_attr("TCA_KIND")
            for message in self.dump(_tc(index), _GETQDISC)
            if message["index"] == index and message["parent"] == _INGRESS_PARENT
        ]
        if not disciplines:
            return False
        ours, others = {}, False
        for message in self._filters(index):
            if message["info"] >> 16 in (PRIORITY, PRIORITY + 1):
                ours[message["info"]] = message.get_attr("TCA_KIND")
            else:
                others = True
        for info, kind in ours.items():
            message = _tc(index)
            message["parent"] = _INGRESS_BLOCK
            message["info"] = info
            message["attrs"] = [["TCA_KIND", kind]]
            self.change(message, _DELTFILTER)
        if ours and not others and disciplines == ["ingress"]:
            message = _tc(index)
            message["handle"] = _INGRESS_HANDLE
            message["parent"] = _INGRESS_PARENT
            self.change(message, _DELQDISC)
        return bool(ours)

    def _filters(self, index: int) -> list[Any]:
        message = _tc(index)
        message["parent"] = _INGRESS_BLOCK
        return self.dump(message, _GETTFILTER)

    def taps(self) -> dict[str, Tap]:
        """The taps of ours by the name of the interface that each is for."""
        found = {}
        for link in self.links():
            name, alias = link.get_attr("IFLA_IFNAME"), link.get_attr("IFLA_IFALIAS") or ""
            if name.startswith(TAP_PREFIX) and alias.startswith(TAP_ALIAS):
                interface, _, owner = alias.removeprefix(TAP_ALIAS).partition(" ")
                found[interface] = Tap(name, link["index"], owner)
        return found


def _tc(index: int) -> Any:
    message = _TcMessage()
    message["index"] = index
    return message


def _raise_failure(data: bytearray, marks: int) -> None:
    """Raise what an NLMSG_ERROR says, unless it is an acknowledgement."""
    (code,) = struct.unpack_from("i", data, 16)
    if code == 0:
        return
    reason = os.strerror(-code)
    if marks & _ACK_TLVS:
        (request,) = struct.unpack_from("I", data, 20)
        offset = 20 + (16 if marks & _CAPPED else request + 3 & ~3)
        while offset + 4 <= len(data):
            length, kind = struct.unpack_from("HH", data, offset)
            if length < 4:
                break
            if kind == 1:
                said = bytes(data[offset + 4 : offset + length]).rstrip(b"\0").decode(errors="replace")
                reason = f"{reason} ({said})"
            offset += length + 3 & ~3
    raise OSError(-code, reason)


def _write_sysctl(family: str, name: str, setting: str, value: str) -> None:
    try:
        with open(f"/proc/sys/net/{family}/conf/{name}/{setting}", "w", encoding="ascii") as file:
            file.write(value)
    except FileNotFoundError:
        return  # a kernel without that family
