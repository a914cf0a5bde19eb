"""The host process that an engine watches: reparented to the engine, in the container's cgroup and the pod's network.

It is forked by a child that ends at once, so that the engine's subreaper becomes its parent; the engine gets its pid by
the pid file and, with a terminal, the other side of that by the console socket.
"""

from __future__ import annotations

import os
import sys

from vmsandbox import records
from vmsandbox.cli import standin
from vmsandbox.errors import InvalidArgumentError, SandboxError, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from vmsandbox.paths import Roots, SandboxPaths

#: the name that runc sends along with the terminal
MASTER = b"/dev/ptmx"
#: characters of a command that a process' title has
SHOWN = 200
SIGKILL = 9


class Standing:
    """A stand-in as whoever forked it knows it."""

    __slots__ = ("_child", "_raw", "_ready", "pid", "start_time")

    def __init__(self, pid: int, ready: int, *, child: bool, raw: bool) -> None:
        self.pid = pid
        self.start_time = records.start_time(pid)
        self._ready = ready
        self._child = child
        #: the terminal is the guest's, and ours only passes on what is typed
        self._raw = raw

    def document(self) -> dict[str, Any]:
        return {"pid": self.pid, "start_time": self.start_time}

    def await_ready(self) -> None:
        """Wait until it is in its cgroups and a signal would find its handler."""
        # It closes its end then.
        os.read(self._ready, 1)

    def announce(self, pid_file: str) -> None:
        """Let it be known, by the pid file if one is wanted: from then on it has to be ready."""
        self.await_ready()
        if pid_file:
            write_pid(pid_file, self.pid)

    def end(self) -> None:
        """Get rid of it: its process never came to be."""
        if records.is_alive(self.pid, self.start_time):
            os.kill(self.pid, SIGKILL)
        if self._child:
            os.waitpid(self.pid, 0)

    def wait(self) -> int:
        """Wait for its end and pass signals on meanwhile; what to exit with."""
        from vmsandbox.cli import foreground, terminal

        with terminal.raw(wanted=self._raw), foreground.forwarding(self.pid):
            _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def fork(
    roots: Roots,
    sandbox: SandboxPaths,
    plan: standin.Plan,
    *,
    netns: str | None,
    console_socket: str = "",
    size: tuple[int, int] | None = None,
    orphan: bool = True,
) -> Standing:
    """Fork the stand-in of a process.  Raises SandboxError if it cannot be set up.

    It enters its cgroups while the caller goes on.  A container's stand-in has namespaces of its own and is in the
    network namespace at `netns` (empty: a new one); the stand-ins of other processes (None) are in none.  With `orphan`
    it is nobody's child here; without, the caller waits for it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe2(os.O_CLOEXEC)
    direct = not orphan and netns is None
    if not orphan and not direct:
        from vmsandbox.cli.runtime import namespaces

        namespaces.adopt_orphans()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            said = b""
            try:
                _prepare(roots, sandbox, plan, netns=netns, console_socket=console_socket, size=size)
                said = b"%d\n" % (os.getpid() if direct else standin.fork(roots, sandbox, plan))
            except (SandboxError, OSError) as error:
                said = b"!" + str(error).encode(errors="replace") + b"\n"
            os.write(writing, said)
            if direct and not said.startswith(b"!"):
                standin.stay(roots, sandbox, plan)
        finally:
            os._exit(0)
    os.close(writing)
    said = b""
    while not said.endswith(b"\n"):
        piece = os.read(reading, 4096)
        if not piece:
            said = b"!the stand-in could not be started\n"
        said += piece
    # Not before it has ended is the stand-in a child of whoever is to be its parent.
    failed = said.startswith(b"!")
    if failed or not direct:
        os.waitpid(child, 0)
    if failed:
        os.close(reading)
        raise SandboxError(said[1:-1].decode(errors="replace"))
    return Standing(int(said), reading, child=not orphan, raw=plan.terminal and not orphan)


def _prepare(
    roots: Roots,
    sandbox: SandboxPaths,
    plan: standin.Plan,
    *,
    netns: str | None,
    console_socket: str,
    size: tuple[int, int] | None,
) -> None:
    if netns is not None:
        from vmsandbox.cli.runtime import starter

        plan.starter = starter.fork(roots, sandbox, plan.container_id, plan.cgroups)
        from vmsandbox.cli.runtime import namespaces

        namespaces.enter(netns)
        namespaces.number_children_anew()
    if console_socket:
        _open_terminal(console_socket, size)
        plan.controlling = True


def _open_terminal(console_socket: str, size: tuple[int, int] | None) -> None:
    """Make a terminal, send its master away, and have its slave as stdio: raw, since the guest has the real one."""
    import fcntl
    import struct
    import termios
    import tty

    from vmsandbox.plainsocket import UnixSocket, send_descriptors

    master, slave = os.openpty()
    if size:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("hhhh", size[1], size[0], 0, 0))
    tty.setraw(slave)
    with UnixSocket() as sock:
        try:
            sock.connect(console_socket)
            send_descriptors(sock, MASTER, [master])
        except OSError as error:
            raise SandboxError(f"cannot use console socket '{console_socket}': {error.strerror}") from error
    os.close(master)
    for fd in range(3):
        os.dup2(slave, fd)
    os.close(slave)


def check_console(*, terminal: bool, console_socket: str, detached: bool) -> None:
    """Raise as runc does where terminal and console socket do not fit together.

    In the foreground the stand-in has the caller's terminal itself.
    """
    if terminal and detached and not console_socket:
        raise InvalidArgumentError("cannot allocate tty if runc will detach without setting console socket")
    if not terminal and console_socket:
        raise InvalidArgumentError("cannot use console socket if runc will not detach or allocate tty")
    if terminal and not detached and console_socket:
        raise InvalidArgumentError("cannot use console socket if runc will not detach or allocate tty")


def shown(args: object) -> str:
    """A program and its arguments on one line that a list of processes can show."""
    words = [str(word) for word in args] if isinstance(args, list) else []
    return printable(" ".join(words))[:SHOWN]


def console_size(process: dict[str, Any]) -> tuple[int, int] | None:
    """Columns and rows that a process object asks for."""
    given = process.get("consoleSize")
    if not isinstance(given, dict):
        return None
    columns, rows = given.get("width"), given.get("height")
    if not isinstance(columns, int) or not isinstance(rows, int) or not (0 < columns < 32768 and 0 < rows < 32768):
        return None
    return columns, rows


def window_size(process: dict[str, Any], *, foreground: bool) -> Sequence[int] | None:
    """Columns and rows that a process' terminal begins with: what it asks for, else those of the caller's own."""
    asked = console_size(process)
    if asked is None and foreground and process.get("terminal") is True:
        from vmsandbox.cli import terminal

        return terminal.window_size()
    return asked


def write_pid(path: str, pid: int) -> None:
    """Write a pid file: there is never one that is empty."""
    temporary = os.path.join(os.path.dirname(path) or ".", f".{os.path.basename(path)}")
    try:
        with open(temporary, "w", encoding="ascii") as file:
            file.write(str(pid))
        os.rename(temporary, path)
    except OSError as error:
        raise SandboxError(f"cannot write pid file '{path}': {error.strerror}") from error
