"""Processes in containers: making their streams, and what is kept of them until it is acknowledged.

A process is known by its container's id and an exec id, which is empty for a container's init.  Whoever attaches may
come before the process does; `Processes.when_made` is where it waits.
"""

from __future__ import annotations

import _socket as socket
import array
import fcntl
import os
import threading
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from vmsandbox_agent import pipes
from vmsandbox_agent.errors import (
    AgentError,
    InvalidStateError,
    NotFoundError,
    TimedOutError,
    UnavailableError,
)
from vmsandbox_agent.stdio import Stdio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vmsandbox_agent.reaper import Child, Exit
    from vmsandbox_protocol import agent_pb2 as pb

#: seconds for crun to hand over a terminal
_CONSOLE_TIMEOUT = 30.0

Key = tuple[str, str]


class Ending(NamedTuple):
    """How a process ended, and whether the kernel killed it for want of memory."""

    exit: Exit
    oom_killed: bool


class Process:
    """One process of a container, from its creation until it is acknowledged or its container removed."""

    def __init__(self, key: Key, child: Child, streams: Stdio) -> None:
        self.key = key
        self.child = child
        self.stdio = streams
        self.started = False
        self.ending: Ending | None = None
        self._ended = threading.Event()
        self._forgotten = False

    @property
    def alive(self) -> bool:
        return self.ending is None

    def end(self, ending: Ending) -> None:
        """Record the end.  The order matters: streams look for `ending` when they are told."""
        self.ending = ending
        self._ended.set()
        self.stdio.process_ended()

    def forget(self) -> None:
        self._forgotten = True
        self._ended.set()
        self.stdio.forget()

    def wait(self, timeout: float | None = None) -> Ending:
        """Wait for the end; raises TimedOutError, UnavailableError if the process is removed meanwhile."""
        if not self._ended.wait(timeout):
            raise TimedOutError(f"process {self.child.pid} has not ended")
        if self.ending is None:
            raise UnavailableError("the process was removed")
        return self.ending

    def signal(self, number: int) -> None:
        if not self.child.kill(number):
            raise InvalidStateError(_described(self.key), state="stopped", wanted="signal")


class Processes:
    """All of them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._processes: dict[Key, Process] = {}
        self._closed = False

    def add(self, process: Process) -> None:
        with self._changed:
            self._processes[process.key] = process
            self._changed.notify_all()

    def get(self, container_id: str, exec_id: str) -> Process:
        with self._changed:
            process = self._processes.get((container_id, exec_id))
        if process is None:
            raise NotFoundError(f"{_described((container_id, exec_id))} does not exist")
        return process

    def has(self, container_id: str, exec_id: str) -> bool:
        with self._changed:
            return (container_id, exec_id) in self._processes

    def when_made(self, container_id: str, exec_id: str, given_up: Callable[[], bool]) -> Process:
        """The process, waiting until there is one or `given_up` says so after `look_again`."""
        with self._changed:
            while True:
                process = self._processes.get((container_id, exec_id))
                if process is not None:
                    return process
                if self._closed or given_up():
                    raise UnavailableError(f"{_described((container_id, exec_id))} was waited for in vain")
                self._changed.wait()

    def look_again(self) -> None:
        """Make those in `when_made` ask whether to give up."""
        with self._changed:
            self._changed.notify_all()

    def of(self, container_id: str) -> list[Process]:
        """A container's processes, its init first."""
        with self._changed:
            return sorted((p for k, p in self._processes.items() if k[0] == container_id), key=lambda p: p.key)

    def all(self) -> list[Process]:
        with self._changed:
            return [*self._processes.values()]

    def forget(self, process: Process) -> None:
        with self._changed:
            if self._processes.get(process.key) is process:
                del self._processes[process.key]
        process.forget()

    def close(self) -> None:
        """Nothing will be made any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Plumbing:
    """Both ends of a new process' streams; the outer ends become its `Stdio`."""

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self.inner: tuple[int | None, int | None, int | None] = (None, None, None)
        self.outer: tuple[int | None, int | None, int | None] = (None, None, None)

    def connected(self) -> Stdio:
        """The outer ends; with a terminal its master, which crun has sent by now."""
        if self.console is not None:
            master = self.console.receive()
            return Stdio(stdin=master, stdout=master, stderr=None, terminal=True)
        stdin, stdout, stderr = self.outer
        self.outer = (None, None, None)
        return Stdio(stdin=stdin, stdout=stdout, stderr=stderr)


@contextmanager
def plumbed(wanted: pb.Stdio, directory: Path, name: str) -> Iterator[Plumbing]:
    """Make pipes, or a socket for the terminal, for the block in which crun creates the process."""
    if wanted.terminal:
        # A socket's path has to fit into 108 bytes, which two ids and the bundles' directory do not.
        with Console.listening(directory.parent.parent / f"{os.urandom(6).hex()}.tty") as console:
            yield Plumbing(console)
        return
    plumbing = Plumbing(None)
    inner: list[int | None] = [None, None, None]
    outer: list[int | None] = [None, None, None]
    try:
        for index, present in enumerate((wanted.stdin, wanted.stdout, wanted.stderr)):
            if present:
                reading, writing = os.pipe2(os.O_CLOEXEC)
                with suppress(OSError):  # the user's share of pipe memory may be used up
                    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, pipes.PIPE_SIZE)
                inner[index], outer[index] = (reading, writing) if index == 0 else (writing, reading)
        plumbing.inner = (inner[0], inner[1], inner[2])
        plumbing.outer = (outer[0], outer[1], outer[2])
        yield plumbing
    finally:
        for fd in (*inner, *plumbing.outer):
            if fd is not None:
                os.close(fd)


class Console:
    """The socket on which crun sends a terminal's master."""

    def __init__(self, listener: socket.socket, path: Path) -> None:
        self._listener = listener
        self.path = path

    @classmethod
    @contextmanager
    def listening(cls, path: Path) -> Iterator[Console]:
        path.unlink(missing_ok=True)
        with ExitStack() as cleanup:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            cleanup.callback(listener.close)
            listener.bind(str(path))
            cleanup.callback(path.unlink, missing_ok=True)
            listener.listen(1)
            yield cls(listener, path)

    def receive(self) -> int:
        """The master's descriptor."""
        self._listener.settimeout(_CONSOLE_TIMEOUT)
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        except TimeoutError:
            raise AgentError("crun has not sent the terminal") from None
        with closing(socket.socket(fileno=fd)) as connection:
            connection.settimeout(_CONSOLE_TIMEOUT)
            size = array.array("i").itemsize
            _, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(size), socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS and len(data) >= size:
                return int.from_bytes(data[:size], "little", signed=True)
        raise AgentError("crun has sent no terminal")


def _described(key: Key) -> str:
    container_id, exec_id = key
    return f"process '{exec_id}' of container '{container_id}'" if exec_id else f"container '{container_id}'"
