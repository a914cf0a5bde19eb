"""Addresses between text and bytes.  The standard library's `ipaddress` takes too long to import under emulation."""

from __future__ import annotations

import _socket as socket
import re

from vmsandbox_agent.errors import InvalidArgumentError

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_SHOWN = 64


def packed(text: str) -> tuple[int, bytes]:
    """Family and bytes of an IP address; raises InvalidArgumentError."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        return family, socket.inet_pton(family, text)
    except (OSError, ValueError):
        raise InvalidArgumentError(f"'{text[:_SHOWN]}' is not an IP address") from None


def network(text: str) -> tuple[int, bytes, int]:
    """Family, address and length of ``ADDRESS/LENGTH``, with no bits set behind the length."""
    address, slash, length = text.partition("/")
    family, data = packed(address)
    bits = int(length) if length.isascii() and length.isdigit() and len(length) < 4 else -1
    if not slash:
        bits = len(data) * 8
    if not 0 <= bits <= len(data) * 8:
        raise InvalidArgumentError(f"'{text[:_SHOWN]}' is not a network: write ADDRESS/LENGTH")
    if int.from_bytes(data, "big") & (1 << len(data) * 8 - bits) - 1:
        raise InvalidArgumentError(f"network '{text[:_SHOWN]}' has bits set behind its length")
    return family, data, bits


def broadcast(address: bytes, length: int) -> bytes:
    """The highest address of an address' network."""
    return (int.from_bytes(address, "big") | (1 << len(address) * 8 - length) - 1).to_bytes(len(address), "big")


def text(data: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET6 if len(data) == 16 else socket.AF_INET, data)


def mac(text: str) -> bytes:
    """The bytes of a MAC address in lower case; raises InvalidArgumentError."""
    if not _MAC.fullmatch(text):
        raise InvalidArgumentError(f"'{text[:_SHOWN]}' is not a MAC address")
    return bytes.fromhex(text.replace(":", ""))
