"""Making a pod's run directory and starting the supervisor that owns it.

The control socket is bound here and passed on, so that the caller can connect at once and nobody polls for a
path.  One lock per pod serialises whoever wants to start a supervisor: the first verb, or a stand-in
whose supervisor died.
"""

from __future__ import annotations

import fcntl
import os
import sys

from vmsandbox import locks, wire
from vmsandbox.cli import nursery
from vmsandbox.errors import AlreadyExistsError, UnavailableError, is_shortage
from vmsandbox.plainsocket import UnixSocket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmsandbox.paths import Roots, SandboxPaths
    from vmsandbox.plainsocket import Socket

#: The supervisor's end of the control socket.
LISTEN_FD = 3
BACKLOG = 256
NURSE = "from vmsandbox.cli import standin; from vmsandbox.supervisor.nursery import nurse; nurse(standin)"


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


class locked:
    """Hold the pod's lock: one at a time starts its supervisor or removes what is left of it."""

    __slots__ = ("_lock", "_path")

    def __init__(self, sandbox: SandboxPaths) -> None:
        self._path = sandbox.lock_file

    def __enter__(self) -> None:
        self._lock = locks.opened(self._path)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except BaseException:
            self._lock.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._lock.close()


def listen(sandbox: SandboxPaths) -> UnixSocket:
    """Bind the pod's control socket, replacing one that nobody serves any more."""
    sock = UnixSocket()
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
    listener: Socket,
    *,
    arguments: tuple[str, ...] = (),
    nursed: bool = False,
    founding: bool = False,
    cgroups: Sequence[str] = (),
) -> None:
    """Start the supervisor of a pod on its bound control socket; it enters `cgroups` before it does anything.

    It keeps none of our descriptors: an engine that reads our output to its end must not wait for a pod.  One that may
    be `nursed` comes out of the run root's nursery, which with `founding` is started for it if there is none.
    """
    log = os.open(sandbox.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        places = (word for place in cgroups for word in ("--cgroup", place))
        words = (sandbox.dir, roots.run_dir, roots.data_dir, *arguments, *places)
        if nursed:
            try:
                done = nursery.forked(roots, listener, log, words, environment())
            except (OSError, ValueError, KeyError, wire.WireError) as error:
                raise broken(error) from error
            if done:
                return
            place = nursery.place(roots) if founding else None
            if place is not None:
                with place:
                    _spawned(NURSE, (roots.run_dir, *words), [place.fileno(), listener.fileno()], log)
                return
        _spawned("from vmsandbox.supervisor.main import main; main()", words, [listener.fileno()], log)
    finally:
        os.close(log)


def broken(error: Exception) -> Exception:
    """What to raise of a nursery that went away in the middle of a request."""
    if isinstance(error, OSError) and is_shortage(error):
        return error  # it is ours
    return UnavailableError(f"the process that starts supervisors ended: {error}: try again")


def found_nursery(roots: Roots) -> None:
    """Have a nursery for the supervisors to come, unless there is one; it is a child of whoever gets our orphans.

    Nothing depends on it, so what fails is left alone.
    """
    try:
        place = nursery.place(roots)
        if place is None:
            return
        with place:
            devnull = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            try:
                _spawned(NURSE, (roots.run_dir,), [place.fileno()], devnull)
            finally:
                os.close(devnull)
    except OSError:
        return


def environment() -> dict[str, str]:
    """What a supervisor gets: ours, with a PATH where an engine gave us none."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        **os.environ,
        # To look for some among all installed packages takes longer than most of what pydantic does for us.
        "PYDANTIC_DISABLE_PLUGINS": "__all__",
    }


def _spawned(code: str, words: tuple[str, ...], descriptors: list[int], log: int) -> None:
    """Run Python code with `descriptors` from `LISTEN_FD` on, and with standard error in a log."""
    # Out of the way of the numbers they are to get.
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, LISTEN_FD + len(descriptors)) for fd in descriptors]
    devnull = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.posix_spawn(
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


def connect(sandbox: SandboxPaths) -> UnixSocket:
    """Connect to the pod's supervisor; `ConnectionRefusedError` or `FileNotFoundError` if none serves it."""
    sock = UnixSocket()
    try:
        sock.connect(sandbox.control_file)
    except BaseException:
        sock.close()
        raise
    return sock


def connect_or_take_over(
    roots: Roots, sandbox: SandboxPaths, *, revive: bool = False, arguments: tuple[str, ...] = ()
) -> UnixSocket:
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
