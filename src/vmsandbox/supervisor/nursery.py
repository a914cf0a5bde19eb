"""A process that has loaded what supervisors need and forks them, for as long as they keep being asked for.

So it does with stand-ins that have nothing of their clients'.

Most of what a supervisor's start costs is loading Python code: a third of a second of processor time and most of its
memory, both the same for each.  So the first client of a run root starts a nursery instead of a supervisor; it forks
that one at once, loads everything, and forks those of later clients while they come.  Engines' first `start` of a
container does that too, but for the supervisor, which is there then.  After `LINGER` seconds without a client, when the
run root is removed, or when its code has been replaced, it ends.  Where machines are to be kept ready for `run`, it has
them made in between.

Supervisors that engines ask for enter cgroups of their own, so where their clients are makes no difference to them; and
a nursery that an engine's `start` has made leaves the cgroup it was made in, which is the engine's to remove.

It is never needed: a client that finds none, or one that is not in the same surroundings as itself (namespaces, control
groups, limits), starts its supervisor without it.  gRPC is loaded here and never used: no process may fork that has had
a connection.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import select
import socket
import struct
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from vmsandbox import cgroups, remains, surroundings, wire
from vmsandbox import log as logs
from vmsandbox.errors import SandboxError
from vmsandbox.paths import Roots
from vmsandbox.supervisor.main import LISTEN_FD, Start, cgroups_in, config_of, main
from vmsandbox.supervisor.parents import Wish
from vmsandbox.supervisor.watch import DELETED, MOVED_FROM, MOVED_ITSELF, Watch
from vmsandbox.title import set_title
from vmsandbox_hypervisor.frequency import host_khz

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import NoReturn

#: seconds without a client after which it ends
LINGER = 60.0
#: where its own socket is, and that of the first supervisor
NURSERY_FD, FIRST_FD = LISTEN_FD, LISTEN_FD + 1
#: seconds after which a parent is made although clients keep coming
BUSY = 3.0
#: seconds until a parent that could not be made is tried again
FORGOTTEN = 600.0
#: seconds a client may take to say what it wants
PATIENCE = 5.0
#: seconds without a client after which machines are made ready
QUIET = 1.0
PRELOADED = (
    "concurrent.futures.thread",
    "grpc.aio",
    "vmsandbox.config.load",
    "vmsandbox.oci.compose",
    "vmsandbox.supervisor.control",
    "vmsandbox.supervisor.bringup",
    "vmsandbox.supervisor.keeping",
    "vmsandbox.supervisor.service",
    "vmsandbox.guest.attachment",
    "vmsandbox.resources.network.rtnl",
    "vmsandbox_hypervisor.qemu.machine",
    "vmsandbox_hypervisor.qemu.vm",
    "vmsandbox_protocol.agent_pb2_grpc",
)


class Standins(Protocol):
    """The program of the stand-ins that it forks."""

    def load(self) -> None:
        """Load what they need."""

    def stay_detached(self, words: Sequence[str]) -> NoReturn:
        """Be one of them from now on, as its client's `words` say."""


def nurse(standins: Standins) -> None:
    """Entry point: ``RUN_ROOT [ARGUMENT...]``, the arguments being the first supervisor's, if one is wanted at once."""
    run_root, *arguments = sys.argv[1:]
    set_title(f"vmsandbox nursery {run_root}")
    os.chdir("/")
    if arguments:
        # It need not wait for what it will load by itself while its machine starts.
        _forked(lambda: _become_first(arguments))
    else:
        cgroups.leave()
    os.closerange(NURSERY_FD + 1, os.sysconf("SC_OPEN_MAX"))
    os.dup2(0, 2)
    with _unhurried():
        for name in PRELOADED:
            importlib.import_module(name)
        standins.load()
        if not arguments:
            _prepare_for_engines()
    _settle()
    with socket.socket(fileno=NURSERY_FD) as listener:
        _serve(listener, run_root, standins, Origin(arguments, dict(os.environ)) if arguments else None)


def _settle() -> None:
    """Write now what whatever is forked would write otherwise: each page that it writes to is one more for itself."""
    logs.set_level(logging.INFO)
    host_khz()
    gc.collect()
    gc.freeze()
    sys._clear_type_cache()


def _prepare_for_engines() -> None:
    """Load what their supervisors need besides, which is a fifth of the memory; it is there the second time."""
    importlib.import_module("vmsandbox.oci.bundle").prepare()


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


def _become_first(arguments: Sequence[str]) -> None:
    os.dup2(FIRST_FD, LISTEN_FD)
    _become(arguments)


@dataclass(frozen=True)
class Origin:
    """What a supervisor that is no engine's was last started with: its arguments and environment."""

    arguments: Sequence[str]
    environment: Mapping[str, str]


def _serve(listener: socket.socket, run_root: str, standins: Standins, origin: Origin | None) -> None:
    path = listener.getsockname()
    loaded = _sources()
    here, group = surroundings.of(os.getpid(), grouped=False), surroundings.cgroups_of(os.getpid())
    waiting = select.poll()
    waiting.register(listener, select.POLLIN)
    watch = Watch()
    watch.add(run_root, MOVED_FROM | DELETED | MOVED_ITSELF)
    waiting.register(watch.fd, select.POLLIN)
    #: somebody came, so that machines may have to be made ready for whoever comes next
    due, last = True, time.monotonic()
    wishes = _Wishes(waiting)
    while os.path.exists(path):
        # Of clients that are refused another one may serve the next: they do not make this one stay.
        left = last + (QUIET if due else LINGER) - time.monotonic()
        events = dict(waiting.poll(max(0.0, left) * 1000))
        if wishes.ended(events):
            continue
        if watch.fd in events:
            if any("." not in name for name in watch.gone()):
                due, last = True, time.monotonic()
        elif _have_changed(loaded):
            break
        elif listener.fileno() in events:
            connection, _ = listener.accept()
            with connection:
                try:
                    client = _attend(connection, standins, here, group)
                except (OSError, ValueError, KeyError, TypeError, wire.WireError):
                    continue
            if client is None:
                continue
            last = time.monotonic()
            if isinstance(client, Wish):
                wishes.add(client)
            elif isinstance(client, Origin) and not Start.of(client.arguments).spare:
                # One that fails to become ready is tried again with the next client, and not for ever.
                origin = client
            due |= isinstance(client, Origin | Wish)
            if wishes.waited():
                wishes.grant(run_root)
        elif due:
            if origin is not None:
                _make_ready(origin, watch)
            wishes.grant(run_root)
            due = False
        else:
            break
    try:
        os.unlink(path)
    except OSError:
        return


def _make_ready(origin: Origin, watch: Watch) -> None:
    """Have as many machines made ready as are wanted; each comes back here for its supervisor."""
    from vmsandbox.config.load import load

    _directory, run_root, data_root, *words = origin.arguments
    roots, rest = Roots(run_root, data_root), Start.of(words).arguments
    try:
        settings = load(roots, config_file=config_of(rest)).sandbox
    except SandboxError:
        return
    if not settings.spares or settings.template == "off":
        return
    os.makedirs(roots.spares_dir, mode=0o700, exist_ok=True)
    # Who takes one does not come here.
    watch.add(roots.spares_dir, DELETED, names=True)

    def become() -> None:
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        code = "from vmsandbox.cli.spares import prepare; prepare()"
        os.execve(sys.executable, [sys.executable, "-c", code, run_root, data_root, *rest], {**origin.environment})

    for _ in range(settings.spares - _ready(roots)):
        _forked(become)


def _ready(roots: Roots) -> int:
    """How many machines are ready, or are being made so."""
    names = {name.partition(".")[0] for name in os.listdir(roots.spares_dir)}
    return sum(remains.is_served(roots.sandbox(name)) for name in names)


class _Wishes:
    """Which parents pods wish for, and who makes them.  One that cannot be had is not tried with each of them."""

    def __init__(self, waiting: select.poll) -> None:
        self._waiting = waiting
        #: since when each is open
        self._open: dict[Wish, float] = {}
        self._keepers: dict[int, tuple[int, Wish]] = {}
        self._failed: dict[Wish, float] = {}

    def add(self, wish: Wish) -> None:
        if time.monotonic() > self._failed.get(wish, -FORGOTTEN) + FORGOTTEN:
            self._open.setdefault(wish, time.monotonic())

    def waited(self) -> bool:
        """Whether one has waited long enough for a quiet moment."""
        return any(time.monotonic() > since + BUSY for since in self._open.values())

    def grant(self, run_root: str) -> None:
        """Have all of them made, each by a process of its own."""
        for wish in self._open:
            keeper = os.fork()
            if keeper == 0:
                # Whatever fails here must not go on as a second nursery.
                try:
                    _keep(run_root, wish)
                finally:
                    os._exit(1)
            pidfd = os.pidfd_open(keeper)
            self._keepers[pidfd] = keeper, wish
            self._waiting.register(pidfd, select.POLLIN)
        self._open.clear()

    def ended(self, events: Iterable[int]) -> bool:
        """Whether it was the end of a keeper that has woken us, who is buried then."""
        gone = [fd for fd in events if fd in self._keepers]
        for pidfd in gone:
            keeper, wish = self._keepers.pop(pidfd)
            self._waiting.unregister(pidfd)
            os.close(pidfd)
            # One that was killed says nothing of the next.
            if os.waitstatus_to_exitcode(os.waitpid(keeper, 0)[1]) > 0:
                self._failed[wish] = time.monotonic()
        return bool(gone)


def _keep(run_root: str, wish: Wish) -> None:
    from vmsandbox.supervisor.keeping import keep

    os.setsid()
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os._exit(0 if keep(run_root, wish) else 1)


def _attend(connection: socket.socket, standins: Standins, here: object, group: str) -> Origin | Wish | bool | None:
    """Fork one client's supervisor or stand-in, or refuse; without a word the client knows that nothing was done.

    Answers None for a refusal, and for what nobody makes anything ready for that it was served.
    """
    connection.settimeout(PATIENCE)
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid != os.geteuid() or surroundings.of(pid, grouped=False) != here:
        return None
    connection.sendall(wire.encode_message({"pid": os.getpid()}))
    head, descriptors, _, _ = socket.recv_fds(connection, wire.HEAD.size, 2)
    try:
        if len(head) != wire.HEAD.size:
            return None
        request = _read(connection, head)
        if "parent" in request:
            return Wish(**request["parent"])
        engine = "arguments" in request and bool(cgroups_in(request["arguments"]))
        if not engine and surroundings.cgroups_of(pid) != group:
            connection.sendall(wire.encode_message({"pid": None}))
            return None
        if "standin" in request:

            def become_standin() -> None:
                _have_environment(request["environment"])
                standins.stay_detached(request["standin"])

            standin = _forked(become_standin)
            connection.sendall(wire.encode_message({"pid": standin}))
            return True
        if len(descriptors) != 2:
            return None

        if engine:
            _prepare_for_engines()

        def become() -> None:
            for fd, target in zip(descriptors, (2, LISTEN_FD), strict=True):
                os.dup2(fd, target)
            _have_environment(request["environment"])
            _become(request["arguments"])

        child = _forked(become)
    finally:
        for fd in descriptors:
            os.close(fd)
    connection.sendall(wire.encode_message({"pid": child}))
    return True if engine else Origin(request["arguments"], request["environment"])


def _have_environment(wanted: Mapping[str, str]) -> None:
    if {**os.environ} != wanted:
        os.environ.clear()
        os.environ.update(wanted)


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


def _sources() -> list[tuple[str, int]]:
    """The files whose code is loaded and when they were changed."""
    files = (getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if "vmsandbox" in name)
    return [(file, os.stat(file).st_mtime_ns) for file in files if file]


def _have_changed(sources: Sequence[tuple[str, int]]) -> bool:
    """Whether what clients expect is newer.  What we have loaded since, for work of our own, does not matter."""
    return any(os.stat(file).st_mtime_ns != changed for file, changed in sources)
