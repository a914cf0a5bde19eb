"""A process that has loaded what supervisors need and forks them, for as long as they keep being asked for.

Most of what a supervisor's start costs is loading Python code: a third of a second of processor time and most of its
memory, both the same for each.  So the first client of a run root starts a nursery instead of a supervisor; it forks
that one at once, loads everything, and forks those of later clients while they come.  After `LINGER` seconds without a
client, or when the run root is removed, it ends.

It is never needed: a client that finds none, or one that is not in the same surroundings as itself (namespaces, control
groups, limits, the code as it is on disk), starts its supervisor without it.  gRPC is not loaded here, because no
process may fork that has.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import resource
import select
import socket
import struct
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vmsandbox import wire
from vmsandbox.supervisor.main import LISTEN_FD, main
from vmsandbox.title import set_title

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

#: seconds without a client after which it ends
LINGER = 60.0
#: where its own socket is, beside the first supervisor's
NURSERY_FD = LISTEN_FD + 1
#: seconds a client may take to say what it wants
PATIENCE = 5.0
PRELOADED = (
    "vmsandbox.config.load",
    "vmsandbox.oci.compose",
    "vmsandbox.supervisor.control",
    "vmsandbox.supervisor.bringup",
    "vmsandbox.supervisor.service",
    "vmsandbox.guest.attachment",
    "vmsandbox.resources.network.rtnl",
    "vmsandbox_hypervisor.qemu.machine",
    "vmsandbox_hypervisor.qemu.vm",
    "vmsandbox_protocol.agent_pb2",
)
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
_IN_MOVED_FROM, _IN_DELETE, _IN_MOVE_SELF, _IN_CLOEXEC = 0x40, 0x200, 0x800, 0o2000000
_EVENTS = 64 * 1024


def nurse() -> None:
    """Entry point: ``RUN_ROOT ARGUMENT...``, the arguments being the first supervisor's, on descriptors 3 and 4."""
    run_root, *arguments = sys.argv[1:]
    set_title(f"vmsandbox nursery {run_root}")
    os.chdir("/")
    # The first need not wait for what it will load by itself while its machine starts.
    _forked(lambda: _become(arguments))
    os.close(LISTEN_FD)
    os.dup2(0, 2)
    with _unhurried():
        for name in PRELOADED:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=NURSERY_FD) as listener:
        _serve(listener, run_root)


@contextmanager
def _unhurried() -> Iterator[None]:
    """Leave the processors to others for the block, where priority can be had back."""
    if os.geteuid() != 0:
        yield
        return
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, usual)


def _forked(become: Callable[[], None]) -> int:
    """The pid of a process that is nobody's child here, but whoever is to have our clients' orphans."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    with os.fdopen(reading, "rb") as pipe:
        between = os.fork()
        if between == 0:
            # Whatever fails here must not go on as a second nursery.
            try:
                child = os.fork()
                if child == 0:
                    become()
                os.write(writing, str(child).encode())
            finally:
                os._exit(1)
        os.close(writing)
        os.waitpid(between, 0)
        return int(pipe.read(32))


def _become(arguments: Sequence[str]) -> None:
    """Be a supervisor from now on; its descriptors are where it expects them."""
    os.setsid()
    main(arguments)


def _serve(listener: socket.socket, run_root: str) -> None:
    path = listener.getsockname()
    loaded = _sources()
    here = surroundings(os.getpid())
    waiting = select.poll()
    waiting.register(listener, select.POLLIN)
    watch = _watched(run_root)
    waiting.register(watch, select.POLLIN)
    while os.path.exists(path):
        events = dict(waiting.poll(LINGER * 1000))
        if watch in events:
            os.read(watch, _EVENTS)
            continue
        if listener.fileno() not in events:
            break
        connection, _ = listener.accept()
        with connection:
            try:
                _attend(connection, here, loaded)
            except (OSError, ValueError, KeyError, wire.WireError):
                continue
    try:
        os.unlink(path)
    except OSError:
        return


def _attend(connection: socket.socket, here: object, loaded: object) -> None:
    """Fork one client's supervisor, or refuse; without a word the client knows that nothing was done."""
    connection.settimeout(PATIENCE)
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid != os.geteuid() or surroundings(pid) != here or _sources() != loaded:
        return
    connection.sendall(wire.encode_message({"pid": os.getpid()}))
    head, descriptors, _, _ = socket.recv_fds(connection, wire.HEAD.size, 2)
    try:
        if len(descriptors) != 2 or len(head) != wire.HEAD.size:
            return
        request = _read(connection, head)

        def become() -> None:
            for fd, target in zip(descriptors, (2, LISTEN_FD), strict=True):
                os.dup2(fd, target)
            os.environ.clear()
            os.environ.update(request["environment"])
            _become(request["arguments"])

        child = _forked(become)
    finally:
        for fd in descriptors:
            os.close(fd)
    connection.sendall(wire.encode_message({"pid": child}))


def _read(connection: socket.socket, head: bytes) -> dict[str, Any]:
    length, kind = wire.HEAD.unpack(head)
    wire.check_length(length)
    payload = bytearray()
    while len(payload) < length:
        part = connection.recv(length - len(payload))
        if not part:
            raise wire.WireError("connection ended within a frame")
        payload += part
    return wire.decode(kind, bytes(payload)).message()


def surroundings(pid: int) -> object:
    """What a process passes on to its children, beside descriptors and environment."""
    process = f"/proc/{pid}"
    root = os.stat(f"{process}/root")
    with open(f"{process}/cgroup") as groups, open(f"{process}/oom_score_adj") as score:
        texts = (groups.read(), score.read())
    limits = [resource.prlimit(pid, getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")]
    places = [os.readlink(f"{process}/ns/{name}") for name in _NAMESPACES]
    scheduling = (os.sched_getaffinity(pid), os.getpriority(os.PRIO_PROCESS, pid))
    return (root.st_dev, root.st_ino, texts, limits, places, scheduling)


def _sources() -> list[tuple[str, int]]:
    """The files whose code is loaded and when they were changed: what is newer is not what a client expects."""
    files = (getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if "vmsandbox" in name)
    return [(file, os.stat(file).st_mtime_ns) for file in files if file]


def _watched(directory: str) -> int:
    """A descriptor that is readable when something in a directory goes, or it moves; it must exist now.

    Of the directory's own removal nobody is told while our socket is in it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.inotify_init1(_IN_CLOEXEC)
    if fd < 0 or libc.inotify_add_watch(fd, os.fsencode(directory), _IN_MOVED_FROM | _IN_DELETE | _IN_MOVE_SELF) < 0:
        raise OSError(ctypes.get_errno(), f"'{directory}' cannot be watched")
    return fd
