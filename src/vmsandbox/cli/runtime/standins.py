"""The host process that an engine watches: reparented to the engine, in the container's cgroup and the pod's network.

It is forked by a child that ends at once, so that the engine's subreaper becomes its parent; the engine gets its pid by
the pid file and, with a terminal, the other side of that by the console socket.
"""

from __future__ import annotations

import os
import signal
import sys

from vmsandbox import records
from vmsandbox.cli import standin
from vmsandbox.cli.runtime import cgroups
from vmsandbox.errors import InvalidArgumentError, SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmsandbox.paths import Roots, SandboxPaths

#: the name that runc sends along with the terminal
MASTER = b"/dev/ptmx"


def fork(
    roots: Roots,
    sandbox: SandboxPaths,
    plan: standin.Plan,
    *,
    places: list[str],
    netns: str | None,
    console_socket: str = "",
    size: tuple[int, int] | None = None,
    orphan: bool = True,
) -> dict[str, Any]:
    """Fork the stand-in of a process; answers its pid and start time.

    `places` are cgroups, `netns` a network namespace to enter (empty: a new one, None: none).  With `orphan` it is
    nobody's child here; without, the caller waits for it.  Raises SandboxError if it cannot be set up.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            said = b""
            try:
                _prepare(plan, places=places, netns=netns, console_socket=console_socket, size=size)
                if orphan:
                    said = b"%d" % standin.fork(roots, sandbox, plan)
            except (SandboxError, OSError) as error:
                said = b"!" + str(error).encode(errors="replace")
            os.write(writing, said)
            os.close(writing)
            if said.startswith(b"!") or orphan:
                os._exit(0)
            standin.stay(roots, sandbox, plan)
        finally:
            os._exit(standin.LOST)
    os.close(writing)
    with open(reading, "rb") as file:
        said = file.read()
    failed = said.startswith(b"!")
    if orphan or failed:
        os.waitpid(child, 0)
    if failed:
        raise SandboxError(said[1:].decode(errors="replace"))
    pid = int(said) if orphan else child
    return {"pid": pid, "start_time": records.start_time(pid)}


def _prepare(
    plan: standin.Plan,
    *,
    places: list[str],
    netns: str | None,
    console_socket: str,
    size: tuple[int, int] | None,
) -> None:
    cgroups.enter(places, os.getpid())
    if netns is not None:
        from vmsandbox.cli.runtime import namespaces

        plan.home = namespaces.enter(netns)
    if plan.terminal:
        _open_terminal(console_socket, size)
        plan.controlling = True


def _open_terminal(console_socket: str, size: tuple[int, int] | None) -> None:
    """Make a terminal, send its master away, and have its slave as stdio: raw, since the guest has the real one."""
    import fcntl
    import socket
    import struct
    import termios
    import tty

    master, slave = os.openpty()
    if size:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("hhhh", size[1], size[0], 0, 0))
    tty.setraw(slave)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(console_socket)
            socket.send_fds(sock, [MASTER], [master])
        except OSError as error:
            raise SandboxError(f"cannot use console socket '{console_socket}': {error.strerror}") from error
    os.close(master)
    for fd in range(3):
        os.dup2(slave, fd)
    os.close(slave)


def check_console(*, terminal: bool, console_socket: str, detached: bool) -> None:
    """Raise as runc does where terminal and console socket do not fit together."""
    if terminal and detached and not console_socket:
        raise InvalidArgumentError("cannot allocate tty if runc will detach without setting console socket")
    if not terminal and console_socket:
        raise InvalidArgumentError("cannot use console socket if runc will not detach or allocate tty")
    if terminal and not detached:
        raise InvalidArgumentError("a terminal in the foreground is not supported: use '--detach --console-socket'")


def console_size(process: dict[str, Any]) -> tuple[int, int] | None:
    """Columns and rows that a process object asks for."""
    given = process.get("consoleSize")
    if not isinstance(given, dict):
        return None
    columns, rows = given.get("width"), given.get("height")
    if not isinstance(columns, int) or not isinstance(rows, int) or not (0 < columns < 32768 and 0 < rows < 32768):
        return None
    return columns, rows


def end(known: dict[str, Any], *, child: bool = False) -> None:
    """Get rid of the stand-in of a process that never came to be."""
    pid = known["pid"]
    if records.is_alive(pid, known["start_time"]):
        os.kill(pid, signal.SIGKILL)
    if child:
        os.waitpid(pid, 0)


def write_pid(path: str, pid: int) -> None:
    """Write a pid file: there is never one that is empty."""
    temporary = os.path.join(os.path.dirname(path) or ".", f".{os.path.basename(path)}")
    try:
        with open(temporary, "w", encoding="ascii") as file:
            file.write(str(pid))
        os.rename(temporary, path)
    except OSError as error:
        raise SandboxError(f"cannot write pid file '{path}': {error.strerror}") from error
