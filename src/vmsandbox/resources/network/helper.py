"""The process that enters a network namespace, does one job there, answers and ends.

Descriptor 0 is a socket: the request is one JSON object up to the end of input, with a descriptor of the namespace
(without one: a new namespace) beside its first byte, the answer one JSON object, with the descriptors of taps beside
its first byte.  A helper may be started before there is anything to do, and imports what it needs meanwhile; without a
request it just ends.

An attachment that fails half way is taken back before the error is answered; the taps themselves vanish with their
last descriptor, so a helper that is killed leaves only filters, which the next attachment or detachment removes.
"""

from __future__ import annotations

import array
import errno
import fcntl
import json
import os
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import (
    AlreadyExistsError,
    NotFoundError,
    SandboxError,
    UnavailableError,
    UnsupportedError,
)
from vmsandbox.resources.network import guard, namespaces
from vmsandbox.resources.network.model import TUN, VHOST_NET

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmsandbox.resources.network.model import Endpoint
    from vmsandbox.resources.network.rtnl import Kernel

REQUEST_FD = 0
#: of a tap that is not yet for an interface
EARLY_NAME = "early"
#: seconds until somebody in the namespace takes a connection
_CONNECT_TIMEOUT = 5.0
#: bytes of a request or an answer
LIMIT = 32 * 1024 * 1024

#: of rtnetlink: links, addresses and routes of both families
_CHANGES = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
_TUNSETIFF, _TUNGETIFF, _TUNGETDEVNETNS = 0x400454CA, 0x800454D2, 0x54E3
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_TUN_EXCL = 0x0002, 0x1000, 0x4000, 0x8000


def main(*, loading: bool = True) -> None:
    """Do a job; without `loading` it is one that needs no conversation with the kernel."""
    with socket.socket(fileno=REQUEST_FD) as sock:
        fds: list[int] = []
        if loading:
            with suppress(ImportError):  # said when it is used
                from vmsandbox.resources.network import rtnl as _early  # noqa: F401
        data, given = _received(sock)
        if not data:
            return
        try:
            request = json.loads(data)
            if given:
                namespaces.enter(given[0])
            else:
                namespaces.enter_new()
            answer = _JOBS[request["job"]](request, given, fds)
        except SandboxError as error:
            answer = {"error": {"code": error.code, "message": str(error)}}
        except guard.TooManyAddressesError as error:
            answer = {"error": {"code": UnsupportedError.code, "message": str(error)}}
        except OSError as error:
            answer = {"error": _described(error)}
        _send(sock, json.dumps(answer).encode(), fds)


def _received(sock: socket.socket) -> tuple[bytes, list[int]]:
    """The request, and the namespace with what else was given."""
    first, fds, _, _ = socket.recv_fds(sock, 1 << 16, 2)
    parts = bytearray(first)
    while first and len(parts) < LIMIT and (part := sock.recv(1 << 16)):
        parts += part
    return bytes(parts), fds


def _send(sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sent = sock.sendmsg([data], rights)
    sock.sendall(data[sent:])


def _described(error: OSError) -> dict[str, str]:
    what = f" ('{error.filename}')" if error.filename else ""
    if error.errno == errno.EPERM:
        return {"code": UnsupportedError.code, "message": f"not permitted to change the network{what}: run as root"}
    return {"code": UnavailableError.code, "message": f"the network cannot be set up{what}: {error.strerror}"}


def _scan(_request: dict[str, Any], _given: list[int], _fds: list[int]) -> dict[str, Any]:
    kernel = _kernel()
    return {"endpoints": [endpoint.document() for endpoint in kernel.endpoints()]}


def _watch(_request: dict[str, Any], _given: list[int], fds: list[int]) -> dict[str, Any]:
    fds.append(_changes())
    return {}


def _changes() -> int:
    """A socket that can be read when something changes; it belongs to the namespace wherever it is read."""
    flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    sock = socket.socket(socket.AF_NETLINK, flags, socket.NETLINK_ROUTE)
    sock.bind((0, _CHANGES))
    return sock.detach()


def _connect(request: dict[str, Any], _given: list[int], fds: list[int]) -> dict[str, Any]:
    """A socket of the namespace, wherever it is used, that is connected to somebody there."""
    kind = socket.SOCK_STREAM if request["stream"] else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(_CONNECT_TIMEOUT)
        sock.connect((request["address"], request["port"]))
        fds.append(sock.detach())
    return {}


def _attach(request: dict[str, Any], given: list[int], fds: list[int]) -> dict[str, Any]:
    kernel = _kernel()
    chosen = _chosen(kernel.endpoints(), request.get("names"))
    taken = kernel.taps()
    for endpoint in chosen:
        if endpoint.name in taken:
            raise AlreadyExistsError(
                f"network interface '{endpoint.name}' is already the one of another pod: "
                "a namespace can be given to one virtual machine only"
            )
    early = EarlyTap(given[1], into=given[0]) if len(given) > 1 else None
    done: list[Endpoint] = []
    try:
        for endpoint in chosen:
            own = early if not done else None
            done.append(endpoint)
            checked = bool(request["source_check"])
            fds.append(_attach_one(kernel, endpoint, request["owner"], checked=checked, early=own))
        vhost = _add_vhosts(fds)
        if request["watch"]:  # from now on: our own changes are none
            fds.append(_changes())
    except BaseException:
        for fd in fds:
            os.close(fd)
        fds.clear()
        if early is not None:
            early.put_back()
        for endpoint in done:
            kernel.clear(endpoint.index)
        raise
    return {"endpoints": [endpoint.document() for endpoint in chosen], "vhost": vhost}


def _chosen(found: list[Endpoint], names: list[str] | None) -> list[Endpoint]:
    if names is None:
        return found
    table = {endpoint.name: endpoint for endpoint in found}
    for name in names:
        if name not in table:
            raise NotFoundError(f"the network namespace has no interface '{name}'")
    return [table[name] for name in names]


def _attach_one(kernel: Kernel, endpoint: Endpoint, owner: str, *, checked: bool, early: EarlyTap | None) -> int:
    """Make the tap of an interface, or take the one that was made early, and join the two.

    What is left on failure the caller clears.
    """
    from vmsandbox.resources.network.answers import TAP_PREFIX

    kernel.clear(endpoint.index)
    name = f"{TAP_PREFIX}{endpoint.index}"
    fd = _opened_tap(name) if early is None else early.taken(name)
    try:
        index = kernel.set_up_tap(name, mtu=endpoint.mtu, alias=f"{endpoint.name} {owner}")
        if checked:
            kernel.check(index, guard.program(endpoint))
        kernel.redirect(index, endpoint.index)
        kernel.redirect(endpoint.index, index)
        kernel.set_up(index)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _opened_tap(name: str) -> int:
    try:
        fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UnsupportedError(f"cannot open '{TUN}': {error.strerror}: load the module with 'modprobe tun'") from error
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EBUSY:
            raise AlreadyExistsError(f"the network namespace has a device '{name}' already") from error
        raise
    return fd


def _tap(_request: dict[str, Any], _given: list[int], fds: list[int]) -> dict[str, Any]:
    """A tap that is alone in a namespace, and goes with its last descriptor as the namespace does."""
    fds.append(_opened_tap(EARLY_NAME))
    return {}


class EarlyTap:
    """A tap that was made, by `_tap`, before there was an interface that it is for."""

    def __init__(self, fd: int, *, into: int) -> None:
        self._fd = fd
        self._into = into
        self._origin = -1

    def taken(self, name: str) -> int:
        """Bring it into the namespace we are in, under a name; another descriptor of it."""
        self._origin = fcntl.ioctl(self._fd, _TUNGETDEVNETNS)
        self._move(self._origin, self._into, name)
        return os.dup(self._fd)

    def put_back(self) -> None:
        """Undo `taken`, if that was done."""
        if self._origin >= 0:
            with suppress(OSError):
                self._move(self._into, self._origin, EARLY_NAME)

    def _move(self, source: int, target: int, name: str) -> None:
        current = fcntl.ioctl(self._fd, _TUNGETIFF, bytes(40))[:16].rstrip(b"\0").decode()
        namespaces.enter(source)
        try:
            _kernel().move(socket.if_nametoindex(current), target, name)
        finally:
            namespaces.enter(self._into)


def _add_vhosts(fds: list[int]) -> bool:
    """One vhost-net descriptor for each tap, behind the taps', where the host has it."""
    opened = []
    for _ in range(len(fds)):
        try:
            opened.append(os.open(VHOST_NET, os.O_RDWR | os.O_CLOEXEC))
        except OSError:
            for fd in opened:
                os.close(fd)
            return False
    fds += opened
    return bool(opened)


def _detach(request: dict[str, Any], _given: list[int], _fds: list[int]) -> dict[str, Any]:
    kernel = _kernel()
    names = request.get("names")
    taps = kernel.taps()
    living = {name for name, tap in taps.items() if tap.owner != request["owner"]}
    removed = set()
    for name, tap in taps.items():
        if name not in living and (names is None or name in names):
            kernel.delete_link(tap.number)
            removed.add(name)
    kept = {tap.name for tap in taps.values()} | living
    for link in kernel.links():
        name = link.get_attr("IFLA_IFNAME")
        if name not in kept and (names is None or name in names) and kernel.clear(link["index"]):
            removed.add(name)
    return {"detached": sorted(removed)}


def _kernel() -> Kernel:
    try:
        from vmsandbox.resources.network.rtnl import Kernel
    except ImportError as error:
        raise UnsupportedError(f"pyroute2 cannot be used: {error}: reinstall vmsandbox") from error
    return Kernel()


_JOBS = {"scan": _scan, "watch": _watch, "connect": _connect, "tap": _tap, "attach": _attach, "detach": _detach}
