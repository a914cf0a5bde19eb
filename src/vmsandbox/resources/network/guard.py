"""Which frames a guest may send, as a program for the kernel's classic BPF.

A guest is hostile.  It can only speak for itself: with its own MAC address, in ARP and neighbour discovery too, and
with the addresses its interface was given.  It cannot pretend to be a router (advertisements, redirects), send tagged
frames, or speak protocols below IP to a bridge (spanning tree, LLDP).  It cannot ask for the loopback of whoever gets
its frames: where a port is published, the host routes such addresses.  An interface without any address is checked for
its MAC address and that only: whoever makes one like that has other plans for it.

Offsets are from the start of the Ethernet header.  Pure.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vmsandbox.resources.network.model import Endpoint

#: verdicts: the next filter decides, or the frame is dropped
PASS = 0xFFFFFFFF
DROP = 2
#: the kernel's limit (BPF_MAXINSNS)
MOST_INSTRUCTIONS = 4096

_LOAD_WORD, _LOAD_HALF, _LOAD_BYTE = 0x20, 0x28, 0x30
_JUMP, _JUMP_EQUAL, _RETURN = 0x05, 0x15, 0x06
_VLAN_TAG_PRESENT = 0xFFFFF000 + 48

_ARP, _IPV4, _IPV6 = 0x0806, 0x0800, 0x86DD
_SOURCE_MAC, _TYPE, _PAYLOAD = 6, 12, 14
_ARP_KIND, _ARP_SENDER_MAC, _ARP_SENDER_IP = _PAYLOAD, _PAYLOAD + 8, _PAYLOAD + 14
_IPV4_SOURCE, _IPV4_DESTINATION = _PAYLOAD + 12, _PAYLOAD + 16
_LOOPBACK = 127
_IPV6_NEXT, _IPV6_SOURCE, _IPV6_PAYLOAD = _PAYLOAD + 6, _PAYLOAD + 8, _PAYLOAD + 40
_HOP_BY_HOP, _ROUTING, _ICMPV6, _DESTINATION_OPTIONS = 0, 43, 58, 60
_ROUTER_SOLICITATION, _ROUTER_ADVERTISEMENT, _NEIGHBOUR_SOLICITATION = 133, 134, 135
_NEIGHBOUR_ADVERTISEMENT, _REDIRECT = 136, 137
_GROUP_REPORTS = (131, 132, 143)


class TooManyAddressesError(ValueError):
    """The interface has more addresses than a program can check."""


class _Program:
    """Instructions with labels; every conditional jump goes over an unconditional one, which reaches any distance."""

    def __init__(self) -> None:
        self._code: list[tuple[int, int, int, int | str]] = []
        self._labels: dict[str, int] = {}
        self._made = 0

    def label(self, name: str) -> None:
        self._labels[name] = len(self._code)

    def fresh(self) -> str:
        self._made += 1
        return f"label {self._made}"

    def load(self, offset: int, size: int) -> None:
        self._code.append(({1: _LOAD_BYTE, 2: _LOAD_HALF, 4: _LOAD_WORD}[size], 0, 0, offset))

    def go(self, label: str) -> None:
        self._code.append((_JUMP, 0, 0, label))

    def go_if(self, value: int, label: str) -> None:
        self._code += [(_JUMP_EQUAL, 0, 1, value), (_JUMP, 0, 0, label)]

    def go_unless(self, value: int, label: str) -> None:
        self._code += [(_JUMP_EQUAL, 1, 0, value), (_JUMP, 0, 0, label)]

    def give(self, verdict: int) -> None:
        self._code.append((_RETURN, 0, 0, verdict))

    def go_unless_bytes(self, offset: int, data: bytes, label: str) -> None:
        """Leave for `label` unless the frame has `data` at `offset`."""
        at = 0
        while at < len(data):
            size = 4 if len(data) - at >= 4 else 2
            self.load(offset + at, size)
            self.go_unless(int.from_bytes(data[at : at + size], "big"), label)
            at += size

    def go_if_one_of(self, offset: int, choices: Iterable[bytes], label: str) -> None:
        """Leave for `label` if the frame has any of the `choices` at `offset`."""
        for data in choices:
            other = self.fresh()
            self.go_unless_bytes(offset, data, other)
            self.go(label)
            self.label(other)

    def assembled(self) -> bytes:
        """An array of struct sock_filter."""
        if len(self._code) > MOST_INSTRUCTIONS:
            raise TooManyAddressesError("the interface has too many addresses for a source check")
        parts = []
        for at, (code, if_true, if_false, operand) in enumerate(self._code):
            value = self._labels[operand] - at - 1 if isinstance(operand, str) else operand
            parts.append(struct.pack("=HBBI", code, if_true, if_false, value))
        return b"".join(parts)


def program(endpoint: Endpoint) -> bytes:
    """What the guest of an endpoint may send; raises `TooManyAddressesError`."""
    mac = bytes.fromhex(endpoint.mac.replace(":", ""))
    made = _Program()
    made.load(_VLAN_TAG_PRESENT, 4)
    made.go_unless(0, "drop")
    made.go_unless_bytes(_SOURCE_MAC, mac, "drop")
    made.load(_TYPE, 2)
    made.go_unless(_IPV4, "elsewhere")
    made.load(_IPV4_DESTINATION, 1)
    made.go_if(_LOOPBACK, "drop")
    made.label("elsewhere")
    if endpoint.addresses:
        addresses = [ipaddress.ip_address(each.address) for each in endpoint.addresses]
        four = [each.packed for each in addresses if each.version == 4]
        six = [each.packed for each in addresses if each.version == 6]
        made.load(_TYPE, 2)
        made.go_if(_IPV4, "ipv4")
        made.go_if(_IPV6, "ipv6")
        made.go_unless(_ARP, "drop")
        _arp(made, mac, four)
        made.label("ipv4")
        made.go_if_one_of(_IPV4_SOURCE, four, "pass")
        made.go("drop")
        _ipv6(made, [link_local(mac), *six])
    made.label("pass")
    made.give(PASS)
    made.label("drop")
    made.give(DROP)
    return made.assembled()


def _arp(made: _Program, mac: bytes, addresses: Sequence[bytes]) -> None:
    """Requests and answers that tell the truth about the sender, and probes, which tell nothing."""
    made.go_unless_bytes(_ARP_KIND, struct.pack(">HHBB", 1, _IPV4, 6, 4), "drop")
    made.go_unless_bytes(_ARP_SENDER_MAC, mac, "drop")
    made.go_if_one_of(_ARP_SENDER_IP, [*addresses, bytes(4)] if addresses else [], "pass")
    made.go("drop")


def _ipv6(made: _Program, sources: Sequence[bytes]) -> None:
    """What neighbour messages say counts for more than where they come from, so they must not be hidden.

    The one use of hop-by-hop options is in group reports, whose length is known; other extension headers in front of
    a message are refused, but for fragments: neighbour messages in fragments are refused by who receives them.
    """
    made.label("ipv6")
    made.load(_IPV6_NEXT, 1)
    made.go_if(_ICMPV6, "icmp")
    made.go_if(_HOP_BY_HOP, "options")
    made.go_if(_ROUTING, "drop")
    made.go_if(_DESTINATION_OPTIONS, "drop")
    made.go("ordinary")
    made.label("icmp")
    made.load(_IPV6_PAYLOAD, 1)
    made.go_if(_ROUTER_ADVERTISEMENT, "drop")
    made.go_if(_REDIRECT, "drop")
    made.go_if(_NEIGHBOUR_SOLICITATION, "maybe without address")
    made.go_if(_ROUTER_SOLICITATION, "maybe without address")
    made.go_unless(_NEIGHBOUR_ADVERTISEMENT, "ordinary")
    made.go_if_one_of(_IPV6_PAYLOAD + 8, sources, "ordinary")
    made.go("drop")
    made.label("ordinary")
    made.go_if_one_of(_IPV6_SOURCE, sources, "pass")
    made.go("drop")
    made.label("options")
    made.go_unless_bytes(_IPV6_PAYLOAD, bytes([_ICMPV6, 0]), "drop")
    made.load(_IPV6_PAYLOAD + 8, 1)
    for report in _GROUP_REPORTS:
        made.go_if(report, "maybe without address")
    made.go("drop")
    made.label("maybe without address")
    made.go_if_one_of(_IPV6_SOURCE, [*sources, bytes(16)], "pass")
    made.go("drop")


def link_local(mac: bytes) -> bytes:
    """The address that an interface gives itself from its MAC address."""
    identifier = bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]
    return bytes.fromhex("fe80000000000000") + identifier
