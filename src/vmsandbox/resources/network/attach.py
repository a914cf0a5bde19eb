"""What the supervisor calls: look into a network namespace, attach its interfaces to taps, detach them.

Each call starts a process that enters the namespace and ends with its answer.  So no thread of ours is ever in a
foreign namespace, pyroute2 is not imported here, and the work runs beside the start of the virtual machine.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import signal
import socket
import sys
import traceback
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import SandboxError, TimedOutError, UnavailableError, from_code
from vmsandbox.resources.network import namespaces
from vmsandbox.resources.network.helper import LIMIT, REQUEST_FD, main
from vmsandbox.resources.network.model import Endpoint
from vmsandbox_hypervisor.aio import finish
from vmsandbox_hypervisor.children import Child, spawn, watched

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

#: seconds a helper may take on a busy machine
TIMEOUT = 30.0
_MOST_FDS = 128


class Tap:
    """The open tap of an interface, for a virtual machine; close it as soon as the machine has it.

    The interface stays attached until the last copy of the descriptor is closed.
    """

    def __init__(self, endpoint: Endpoint, fd: int, vhost_fd: int | None = None) -> None:
        self.endpoint = endpoint
        self.fd = fd
        #: whether it was there before the interface was: whoever has it may have it already
        self.early = False
        #: of /dev/vhost-net, where the host has it
        self.vhost_fd = vhost_fd

    def close(self) -> None:
        for fd in (self.fd, self.vhost_fd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self.fd, self.vhost_fd = -1, None


async def scan(path: str) -> list[Endpoint]:
    """The interfaces of the network namespace at `path`, in the order of their indices.

    Raises InvalidArgumentError if there is no namespace, UnsupportedError if it is the host's.
    """
    with namespaces.opened(path) as fd:
        answer, _ = await _ask({"job": "scan"}, [fd])
    return _endpoints(answer)


async def watch(path: str) -> int:
    """A descriptor that can be read when links, addresses or routes of the namespace at `path` have changed."""
    with namespaces.opened(path) as fd:
        _, fds = await _ask({"job": "watch"}, [fd])
    return fds[0]


async def connected(path: str, address: str, port: int, *, stream: bool) -> socket.socket:
    """A socket, TCP for a `stream` and else UDP, connected within the namespace at `path`; the caller closes it."""
    helper = Helper(loading=False)
    try:
        with namespaces.opened(path) as fd:
            request = {"job": "connect", "address": address, "port": port, "stream": stream}
            _, fds = await helper.ask(request, [fd])
    finally:
        await helper.close()
    sock = socket.socket(fileno=fds[0])
    sock.setblocking(False)
    return sock


async def attach(
    path: str,
    *,
    names: Sequence[str] | None = None,
    source_check: bool = True,
    owner: str = "",
    early: int = -1,
) -> list[Tap]:
    """Give every interface (or the named ones) of the namespace at `path` a tap; all of them or none.

    `owner` is who may `detach` while it lives.  The first interface gets the tap that was made `early`, if any.

    With `source_check` the guest can send with its own addresses only.  Filters that a pod before this one left are
    replaced.  Raises AlreadyExistsError where an interface belongs to a pod that still runs, NotFoundError for an
    unknown name, and what `scan` raises.
    """
    helper = Helper()
    try:
        taps, _ = await attach_by(helper, path, names=names, source_check=source_check, owner=owner, early=early)
    finally:
        await helper.close()
    return taps


async def attach_by(
    helper: Helper,
    path: str,
    *,
    names: Sequence[str] | None = None,
    source_check: bool = True,
    owner: str = "",
    watched: bool = False,
    early: int = -1,
) -> tuple[list[Tap], int]:
    """`attach` by a helper that was started before there was a namespace; with `watched` also what `watch` answers."""
    request = {
        "job": "attach",
        "names": list(names) if names is not None else None,
        "source_check": source_check,
        "owner": owner,
        "watch": watched,
    }
    with namespaces.opened(path) as fd:
        answer, fds = await helper.ask(request, [fd] if early < 0 else [fd, early])
    try:
        endpoints = _endpoints(answer)
        count = len(endpoints)
        vhosts: list[int | None] = [*fds[count : 2 * count]] if answer.get("vhost") else [None] * count
        taps = [Tap(endpoint, tap, vhost) for endpoint, tap, vhost in zip(endpoints, fds[:count], vhosts, strict=True)]
        if taps and early >= 0:
            taps[0].early = True
        return taps, fds[-1] if watched else -1
    except BaseException:
        _close(fds)
        raise


async def early_tap(helper: Helper) -> int:
    """A tap that leads nowhere until `attach` takes it for an interface; the caller closes it.

    The `helper` ends with it, whatever happens.
    """
    try:
        _, fds = await helper.ask({"job": "tap"}, [])
        return fds[0]
    finally:
        await helper.close()


async def detach(path: str, *, names: Iterable[str] | None = None, owner: str = "") -> list[str]:
    """Undo `attach`, however incomplete, and say of which interfaces; safe to repeat.

    What a living pod other than `owner` has attached stays.  A namespace that is gone is fine.
    """
    if not os.path.exists(path):
        return []
    request = {"job": "detach", "names": list(names) if names is not None else None, "owner": owner}
    with namespaces.opened(path) as fd:
        answer, _ = await _ask(request, [fd])
    return [str(name) for name in answer.get("detached", ())]


@asynccontextmanager
async def attached(
    path: str, *, names: Sequence[str] | None = None, source_check: bool = True, owner: str = ""
) -> AsyncIterator[list[Tap]]:
    """`attach` for the duration of the block."""
    taps = await attach(path, names=names, source_check=source_check, owner=owner)
    try:
        yield taps
    finally:
        for tap in taps:
            tap.close()
        await finish(_detach(path, [tap.endpoint.name for tap in taps], owner), seconds=2 * TIMEOUT)


async def _detach(path: str, names: list[str], owner: str) -> None:
    await detach(path, names=names, owner=owner)


def _endpoints(answer: dict[str, Any]) -> list[Endpoint]:
    return [Endpoint.of(document) for document in answer.get("endpoints", ())]


# ---------------------------------------------------------------- the helper process


class Helper:
    """A process that can do one job in a namespace, ready by the time it is asked.

    Forked where that is possible, because what it needs is loaded then, else Python anew.  Without `loading` it can
    make a tap or a connection only.
    """

    def __init__(self, *, loading: bool = True) -> None:
        try:
            self._start(loading=loading)
        except OSError as error:
            raise UnavailableError(f"cannot start the network's helper: {error.strerror or error}") from error

    def _start(self, *, loading: bool) -> None:
        self._sock, theirs = socket.socketpair()
        self._messages = -1
        try:
            with theirs:
                self._messages = os.memfd_create("messages", os.MFD_CLOEXEC)
                if "grpc" in sys.modules:  # whose threads no fork survives
                    fds = {REQUEST_FD: theirs.fileno()}
                    self._child = spawn("network helper", _argv(loading), fds=fds, stderr=self._messages)
                else:
                    self._child = _forked(theirs.fileno(), self._messages, loading=loading)
        except BaseException:
            self._release()
            raise

    async def ask(self, request: dict[str, Any], given: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
        """Its answer and the descriptors that came with it, which are the caller's; only once.

        The first of what is `given` is the namespace; without, it is one that nobody else is in.
        """
        fds: list[int] = []
        try:
            try:
                async with asyncio.timeout(TIMEOUT):
                    data = json.dumps(request).encode()
                    sent = socket.send_fds(self._sock, [data], given)
                    self._sock.setblocking(False)
                    await asyncio.get_running_loop().sock_sendall(self._sock, data[sent:])
                    self._sock.shutdown(socket.SHUT_WR)
                    data = await _received(self._sock, fds)
                    await self._child.wait()
            except TimeoutError:
                raise TimedOutError(f"the network's '{request['job']}' took longer than {TIMEOUT:g} s") from None
            except BrokenPipeError:
                data = b""  # what it printed tells why it ended
            return _answer(data, self._messages), fds
        except BaseException:
            _close(fds)
            raise

    async def close(self) -> None:
        """End it, whatever it does; safe to repeat."""
        try:
            if self._child.alive:
                await finish(self._child.stop())
        finally:
            self._release()

    def _release(self) -> None:
        self._sock.close()
        if self._messages >= 0:
            os.close(self._messages)
            self._messages = -1


def _forked(request: int, messages: int, *, loading: bool) -> Child:
    """A child of ours that is a helper; of what we have open it keeps two descriptors."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            os.dup2(request, REQUEST_FD)
            os.dup2(messages, 1)
            os.dup2(messages, 2)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            main(loading=loading)
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    return watched("network helper", pid)


async def _ask(request: dict[str, Any], given: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
    """Have a helper do a job."""
    helper = Helper()
    try:
        return await helper.ask(request, given)
    finally:
        await helper.close()


def _argv(loading: bool) -> list[str]:
    """Python without its start-up work: the directories it would find are the ones we have."""
    code = (
        f"import sys; sys.path[:] = {[entry for entry in sys.path if entry]!r}; "
        f"from vmsandbox.resources.network.helper import main; main(loading={loading})"
    )
    return [sys.executable, "-I", "-S", "-c", code]


async def _received(sock: socket.socket, fds: list[int]) -> bytes:
    """Everything up to the end; descriptors are put into `fds` as they come."""
    loop = asyncio.get_running_loop()
    size = array.array("i").itemsize
    parts = bytearray()
    while len(parts) < LIMIT:
        readable = loop.create_future()
        loop.add_reader(sock, _resolve, readable)
        try:
            await readable
        finally:
            loop.remove_reader(sock)
        try:
            data, ancillary, _, _ = sock.recvmsg(1 << 16, socket.CMSG_SPACE(_MOST_FDS * size))
        except BlockingIOError:
            continue
        except ConnectionResetError:  # the helper died without reading its request
            break
        for level, kind, rights in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds += array.array("i", rights[: len(rights) - len(rights) % size])
        if not data:
            break
        parts += data
    return bytes(parts)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _answer(data: bytes, messages: int) -> dict[str, Any]:
    try:
        answer = json.loads(data)
    except ValueError:
        printed = os.pread(messages, 64 * 1024, 0).decode(errors="replace")
        raise UnavailableError(
            "the network's helper failed: 'vmsandbox check' says what this machine lacks", detail=printed
        ) from None
    if not isinstance(answer, dict):
        raise UnavailableError("the network's helper gave no answer that can be read: try again")
    error = answer.get("error")
    if error:
        raise _error(error)
    return answer


def _error(error: dict[str, Any]) -> SandboxError:
    return from_code(str(error.get("code")), str(error.get("message")))


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
    fds.clear()
