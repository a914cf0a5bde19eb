"""Making a pod's run directory and starting the supervisor that owns it.

The control socket is bound here and passed on, so that the caller can connect at once and nobody polls for a
path.  One lock per pod serialises whoever wants to start a supervisor: the first verb, or a stand-in
whose supervisor died.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from contextlib import contextmanager

from vmsandbox import wire
from vmsandbox.cli import nursery
from vmsandbox.errors import AlreadyExistsError, UnavailableError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmsandbox.paths import Roots, SandboxPaths

#: The supervisor's end of the control socket.
LISTEN_FD = 3
BACKLOG = 256


def make_run_directory(roots: Roots, sandbox_id: str) -> SandboxPaths:
    """Make the directory of a new pod, private to us; its id is taken if it exists."""
    for directory in (roots.run_dir, roots.sandboxes_dir, roots.by_container_dir, roots.by_pod_dir, roots.names_dir):
        try:
            os.makedirs(directory, mode=0o711 if directory in (roots.run_dir, roots.sandboxes_dir) else 0o700)
        except FileExistsError:
            continue
        except OSError as error:
            raise UnavailableError(
                f"cannot make '{directory}': {error.strerror}; run as root or choose another --root"
            ) from error
    sandbox = roots.sandbox(sandbox_id)
    try:
        # QEMU, under its own uid, must be able to pass through, and only that.
        os.mkdir(sandbox.dir, 0o711)
        os.mkdir(sandbox.containers_dir, 0o700)
    except FileExistsError:
        raise AlreadyExistsError(f"a pod with id '{sandbox_id}' already exists") from None
    except OSError as error:
        raise UnavailableError(f"cannot make '{sandbox.dir}': {error.strerror}; is '{roots.run_dir}' full?") from error
    return sandbox


@contextmanager
def locked(sandbox: SandboxPaths) -> Iterator[None]:
    """Hold the pod's lock: one at a time starts its supervisor or removes what is left of it."""
    with open(sandbox.lock_file, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def listen(sandbox: SandboxPaths) -> socket.socket:
    """Bind the pod's control socket, replacing one that nobody serves any more."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.unlink(sandbox.control_file)
    except FileNotFoundError:
        pass
    old = os.umask(0o177)
    try:
        sock.bind(sandbox.control_file)
    finally:
        os.umask(old)
    sock.listen(BACKLOG)
    return sock


def spawn_supervisor(
    roots: Roots,
    sandbox: SandboxPaths,
    listener: socket.socket,
    *,
    arguments: tuple[str, ...] = (),
    nursed: bool = False,
) -> int:
    """Start the supervisor of a pod on its bound control socket and return its pid.

    It keeps none of our descriptors: an engine that reads our output to its end must not wait for a pod.  One that may
    be `nursed` comes out of the run root's nursery; if that has to be started for it, the pid is the nursery's.
    """
    log = os.open(sandbox.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        words = (sandbox.dir, roots.run_dir, roots.data_dir, *arguments)
        if nursed:
            try:
                pid = nursery.forked(roots, listener, log, words, environment())
            except (OSError, ValueError, KeyError, wire.WireError) as error:
                raise UnavailableError(f"the process that starts supervisors ended: {error}: try again") from error
            if pid is not None:
                return pid
            place = nursery.place(roots)
            if place is not None:
                with place:
                    code = "from vmsandbox.supervisor.nursery import nurse; nurse()"
                    return _spawned(code, (roots.run_dir, *words), [listener.fileno(), place.fileno()], log)
        return _spawned("from vmsandbox.supervisor.main import main; main()", words, [listener.fileno()], log)
    finally:
        os.close(log)


def environment() -> dict[str, str]:
    """What a supervisor gets: ours, with a PATH where an engine gave us none."""
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **os.environ}


def _spawned(code: str, words: tuple[str, ...], descriptors: list[int], log: int) -> int:
    """Run Python code with `descriptors` from `LISTEN_FD` on, and with standard error in a log."""
    # Out of the way of the numbers they are to get.
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, LISTEN_FD + len(descriptors)) for fd in descriptors]
    devnull = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", code, *words],
            environment(),
            file_actions=[
                (os.POSIX_SPAWN_DUP2, devnull, 0),
                (os.POSIX_SPAWN_DUP2, devnull, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
                *((os.POSIX_SPAWN_DUP2, fd, LISTEN_FD + number) for number, fd in enumerate(moved)),
            ],
            setsid=True,
            setsigmask=[],
        )
    finally:
        for fd in (devnull, *moved):
            os.close(fd)


def connect(sandbox: SandboxPaths) -> socket.socket:
    """Connect to the pod's supervisor; `ConnectionRefusedError` or `FileNotFoundError` if none serves it."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(sandbox.control_file)
    except BaseException:
        sock.close()
        raise
    return sock


def connect_or_take_over(
    roots: Roots, sandbox: SandboxPaths, *, revive: bool = False, arguments: tuple[str, ...] = ()
) -> socket.socket:
    """Connect to the pod's supervisor, starting one that adopts the pod where it died.

    With `revive` the supervisor brings up a new machine on request, if the pod has none.

    Raises `FileNotFoundError` when the pod itself is gone.
    """
    with locked(sandbox):
        try:
            return connect(sandbox)
        except (ConnectionRefusedError, FileNotFoundError):
            pass
        if not os.path.exists(sandbox.document_file):
            raise FileNotFoundError(sandbox.document_file)
        with listen(sandbox) as listener:
            mode = "--revive" if revive else "--adopt"
            spawn_supervisor(roots, sandbox, listener, arguments=(mode, *arguments))
        return connect(sandbox)
