"""The frames a guest may send, judged by an interpreter of the same programs."""

from __future__ import annotations

import struct

import pytest

from tests.harness import frames
from tests.harness.frames import BROADCAST, OTHER, arp, behind_options, ether, icmp6, ipv4, ipv6
from vmsandbox.resources.network import guard
from vmsandbox.resources.network.model import Address, Endpoint

OWN = "10.9.0.2"
OWN_6 = "fd09::2"
LINK_LOCAL = "fe80::aa:bbff:fecc:dd01"
ENDPOINT = Endpoint(
    name="eth0",
    mac="02:aa:bb:cc:dd:01",
    mtu=1500,
    addresses=(
        Address(address=OWN, prefix=24),
        Address(address="10.9.0.3", prefix=24),
        Address(address=OWN_6, prefix=64),
    ),
)


def verdict(endpoint: Endpoint, frame: bytes, *, tag: bool = False) -> str:
    """What the kernel would do, by the rules of classic BPF."""
    code = guard.program(endpoint)
    at, accumulator = 0, 0
    while True:
        operation, if_true, if_false, operand = struct.unpack_from("=HBBI", code, at * 8)
        at += 1
        if operation in (0x20, 0x28, 0x30):
            size = {0x20: 4, 0x28: 2, 0x30: 1}[operation]
            if operand == 0xFFFFF000 + 48:
                accumulator = int(tag)
            elif operand + size > len(frame):
                return "drop"  # the kernel ends the program with 0: not redirected, and no stack takes so short a frame
            else:
                accumulator = int.from_bytes(frame[operand : operand + size], "big")
        elif operation == 0x05:
            at += operand
        elif operation == 0x15:
            at += if_true if accumulator == operand else if_false
        else:
            assert operation == 0x06
            return {guard.PASS: "pass", guard.DROP: "drop"}[operand]


HONEST = {
    "an ARP request": arp(OWN, "10.9.0.1"),
    "an ARP answer": arp(OWN, "10.9.0.1", operation=2),
    "an ARP probe": arp("0.0.0.0", OWN),
    "ARP for a second address": arp("10.9.0.3", "10.9.0.1"),
    "IPv4": ipv4(OWN, "10.9.0.1"),
    "IPv4 to anywhere": ipv4("10.9.0.3", "192.0.2.9"),
    "IPv6": ipv6(OWN_6, "fd09::1"),
    "IPv6 from the link-local address": ipv6(LINK_LOCAL, "ff02::1"),
    "IPv6 in fragments": ipv6(OWN_6, "fd09::1", next_header=44, payload=bytes(64)),
    "an echo request": icmp6(OWN_6, "fd09::1", 128),
    "duplicate address detection": icmp6("::", "ff02::1:ff00:2", 135, about=OWN_6),
    "a neighbour solicitation": icmp6(OWN_6, "ff02::1:ff00:1", 135, about="fd09::1"),
    "a router solicitation": icmp6("::", "ff02::2", 133),
    "an advertisement of itself": icmp6(LINK_LOCAL, "ff02::1", 136, about=OWN_6),
    "a group report": behind_options("::", 143),
    "a group report of version 1": behind_options(LINK_LOCAL, 131),
}
HOSTILE = {
    "another MAC": ipv4(OWN, "10.9.0.1", source=OTHER),
    "ARP from another MAC": arp(OWN, "10.9.0.1", source=OTHER),
    "ARP that names another MAC": arp(OWN, "10.9.0.1", mac=OTHER),
    "ARP for the gateway": arp("10.9.0.1", "10.9.0.7", operation=2),
    "a gratuitous ARP for a neighbour": arp("10.9.0.7", "10.9.0.7"),
    "ARP of another kind": ether(0x0806, struct.pack(">HHBBH", 6, 0x0800, 6, 4, 1) + bytes(20)),
    "another IPv4 address": ipv4("10.9.0.7", "10.9.0.1"),
    "from the host's loopback": ipv4("127.0.0.1", "10.9.0.1"),
    "to the host's loopback": ipv4(OWN, "127.0.0.1"),
    "to another address of the host's loopback": ipv4(OWN, "127.9.8.7"),
    "no IPv4 address": ipv4("0.0.0.0", "255.255.255.255"),
    "another IPv6 address": ipv6("fd09::7", "fd09::1"),
    "another link-local address": ipv6("fe80::1", "ff02::1"),
    "an advertisement of the router": icmp6(OWN_6, "ff02::1", 136, about="fd09::1"),
    "an advertisement from another": icmp6("fe80::1", "ff02::1", 136, about=OWN_6),
    "a router advertisement": icmp6(LINK_LOCAL, "ff02::1", 134),
    "a redirect": icmp6(LINK_LOCAL, "ff02::1", 137),
    "an advertisement behind options": behind_options(OWN_6, 136, about="fd09::1"),
    "an advertisement behind long options": behind_options(OWN_6, 143, length=1),
    "an advertisement behind destination options": behind_options(OWN_6, 136, about="fd09::1", extension=60),
    "an advertisement behind a routing header": behind_options(OWN_6, 136, about="fd09::1", extension=43),
    "a solicitation without address from nowhere else": icmp6("::", "ff02::1", 128),
    "spanning tree": BROADCAST + frames.GUEST + struct.pack(">H", 38) + bytes(38),
    "LLDP": ether(0x88CC, bytes(30)),
    "a frame too short to judge": ether(0x0800, b"\x45"),
}


@pytest.mark.parametrize("what", HONEST)
def test_an_honest_guest_may_send(what: str) -> None:
    assert verdict(ENDPOINT, HONEST[what]) == "pass"


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_guest_may_not_send(what: str) -> None:
    assert verdict(ENDPOINT, HOSTILE[what]) == "drop"


@pytest.mark.parametrize("what", HONEST)
def test_nothing_tagged_passes(what: str) -> None:
    assert verdict(ENDPOINT, HONEST[what], tag=True) == "drop"
    assert verdict(ENDPOINT, frames.tagged(HONEST[what])) == "drop"


def test_an_interface_without_addresses_is_checked_for_its_mac_and_the_loopback() -> None:
    bare = Endpoint(name="eth0", mac=ENDPOINT.mac, mtu=1500)
    assert verdict(bare, ether(0x88CC, bytes(30))) == "pass"
    assert verdict(bare, ipv4("10.9.0.7", "10.9.0.1")) == "pass"
    assert verdict(bare, ipv4("10.9.0.7", "10.9.0.1", source=OTHER)) == "drop"
    assert verdict(bare, ipv4("10.9.0.7", "127.0.0.1")) == "drop"


def test_an_interface_without_ipv4_speaks_no_ipv4() -> None:
    six = Endpoint(name="eth0", mac=ENDPOINT.mac, mtu=1500, addresses=(Address(address=OWN_6, prefix=64),))
    assert verdict(six, ipv6(OWN_6, "fd09::1")) == "pass"
    assert verdict(six, ipv4(OWN, "10.9.0.1")) == "drop"
    assert verdict(six, arp("0.0.0.0", OWN)) == "drop"


def test_more_addresses_than_a_program_can_check_are_refused() -> None:
    many = tuple(Address(address=f"fd09::{number:x}", prefix=64) for number in range(1, 300))
    with pytest.raises(guard.TooManyAddressesError):
        guard.program(Endpoint(name="eth0", mac=ENDPOINT.mac, mtu=1500, addresses=many))
