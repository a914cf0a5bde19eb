"""Ports of the host that lead to a pod: where they can be published, and reserved while the pod has them.

Connections are led away before a socket sees them, so that nothing but a socket of our own keeps another program
from taking such a port.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import AlreadyExistsError, ExhaustedError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmsandbox.resources.network.options import Port

#: kind and number of a published port's protocol
_PROTOCOLS = {
    "tcp": (socket.SOCK_STREAM, socket.IPPROTO_TCP),
    "udp": (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    "sctp": (socket.SOCK_STREAM, socket.IPPROTO_SCTP),
}


def check_addresses(ports: Iterable[Port], *, ipv6: bool) -> None:
    """Raise InvalidArgumentError for a port at an address at which nothing would answer."""
    for port in ports:
        if ":" not in port.ip:
            continue
        if ipaddress.ip_address(port.ip).is_loopback:
            raise InvalidArgumentError(
                f"cannot publish at '{port.ip}': the kernel leads nothing on from its own IPv6 loopback"
            )
        if not ipv6:
            raise InvalidArgumentError(
                f"cannot publish at '{port.ip}': the default network has no IPv6; 'network.ipv6' gives it some"
            )


def mapping(port: Port) -> dict[str, Any]:
    """As the `portmap` plugin takes it."""
    mapping: dict[str, Any] = {"hostPort": port.host, "containerPort": port.inner, "protocol": port.protocol}
    if port.ip:
        mapping["hostIP"] = port.ip
    return mapping


def reserved(ports: Iterable[Port], *, ipv6: bool) -> list[socket.socket]:
    """Sockets that hold the ports, as long as they are open.

    Raises AlreadyExistsError for one that is in use, ExhaustedError for more than this process may have open.
    """
    held: list[socket.socket] = []
    try:
        for port in ports:
            for family in _families(port, ipv6=ipv6):
                sock = _bound(port, family)
                if sock is not None:
                    held.append(sock)
    except BaseException:
        for sock in held:
            sock.close()
        raise
    return held


def _families(port: Port, *, ipv6: bool) -> list[socket.AddressFamily]:
    """Of the addresses at which a port is published."""
    if port.ip:
        return [socket.AF_INET6 if ":" in port.ip else socket.AF_INET]
    return [socket.AF_INET, socket.AF_INET6] if ipv6 else [socket.AF_INET]


def _bound(port: Port, family: socket.AddressFamily) -> socket.socket | None:
    """A socket that nobody talks to: connections are led away before they reach it.  None without that protocol."""
    kind, number = _PROTOCOLS[port.protocol]
    try:
        held = socket.socket(family, kind | socket.SOCK_CLOEXEC, number)
    except OSError as error:
        if error.errno in (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.ESOCKTNOSUPPORT):
            return None
        raise ExhaustedError(
            f"cannot reserve port '{port.host}/{port.protocol}': {error.strerror}; publish fewer, or raise the limit "
            "of open files (ulimit -n)"
        ) from error
    try:
        if family == socket.AF_INET6:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        _bind(held, (port.ip, port.host))
    except OSError as error:
        held.close()
        if error.errno == errno.EADDRINUSE:
            raise AlreadyExistsError(
                f"port '{port.host}/{port.protocol}' of the host is in use: choose another, or end what listens there"
            ) from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise InvalidArgumentError(f"cannot publish at '{port.ip}': it is no address of the host") from error
        raise InvalidArgumentError(f"cannot publish port '{port}': {error.strerror}") from error
    return held


def _bind(sock: socket.socket, address: tuple[str, int]) -> None:
    """Bind to what no other program has, although connections that it once had may not be forgotten yet."""
    try:
        sock.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or sock.type != socket.SOCK_STREAM:
            raise
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # From now on nobody may listen beside it.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
