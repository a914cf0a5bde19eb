"""Ethernet frames as a guest would send them, honest or not."""

from __future__ import annotations

import ipaddress
import struct

GUEST = bytes.fromhex("02aabbccdd01")
OTHER = bytes.fromhex("02aabbccdd99")
BROADCAST = b"\xff" * 6
#: no offloads: what stands in front of each frame of a tap with vnet_hdr
NO_OFFLOAD = bytes(10)


def ether(kind: int, payload: bytes, *, source: bytes = GUEST, target: bytes = BROADCAST) -> bytes:
    return target + source + struct.pack(">H", kind) + payload


def arp(sender: str, target: str, *, mac: bytes = GUEST, source: bytes = GUEST, operation: int = 1) -> bytes:
    addresses = (ipaddress.ip_address(sender).packed, bytes(6), ipaddress.ip_address(target).packed)
    return ether(0x0806, struct.pack(">HHBBH", 1, 0x0800, 6, 4, operation) + mac + b"".join(addresses), source=source)


def ipv4(sender: str, target: str, *, source: bytes = GUEST, to: bytes = BROADCAST, payload: bytes = b"") -> bytes:
    """A UDP-like datagram with a valid header."""
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, 17, 0)
    head += ipaddress.ip_address(sender).packed + ipaddress.ip_address(target).packed
    total = sum(struct.unpack(">10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack(">H", ~(total + (total >> 16)) & 0xFFFF) + head[12:]
    return ether(0x0800, head + payload, source=source, target=to)


def ipv6(sender: str, target: str, *, next_header: int = 17, payload: bytes = b"", source: bytes = GUEST) -> bytes:
    head = struct.pack(">IHBB", 6 << 28, len(payload), next_header, 255)
    head += ipaddress.ip_address(sender).packed + ipaddress.ip_address(target).packed
    return ether(0x86DD, head + payload, source=source)


def icmp6(sender: str, target: str, kind: int, *, about: str = "::", source: bytes = GUEST) -> bytes:
    """A neighbour message about an address."""
    payload = struct.pack(">BBHI", kind, 0, 0, 0) + ipaddress.ip_address(about).packed
    return ipv6(sender, target, next_header=58, payload=payload, source=source)


def behind_options(sender: str, kind: int, *, about: str = "::", extension: int = 0, length: int = 0) -> bytes:
    """An ICMPv6 message behind an extension header of 8 * (length + 1) bytes."""
    options = struct.pack(">BB", 58, length) + bytes(6 + 8 * length)
    message = struct.pack(">BBHI", kind, 0, 0, 0) + ipaddress.ip_address(about).packed
    return ipv6(sender, "ff02::16", next_header=extension, payload=options + message)


def tagged(frame: bytes) -> bytes:
    """A frame with an 802.1Q tag."""
    return frame[:12] + struct.pack(">HH", 0x8100, 5) + frame[12:]
