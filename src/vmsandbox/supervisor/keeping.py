"""The process that has a parent made and keeps it: for as long as pods are forked from it, and a minute more.

The nursery forks it when a pod has wished for one and nobody has asked for anything since.  With it the parent ends;
what was forked goes on.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import select
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

from vmsandbox import documents, locks, machines, records, remains, surroundings
from vmsandbox import log as logs
from vmsandbox.errors import SandboxError
from vmsandbox.paths import Roots
from vmsandbox.supervisor import parents
from vmsandbox.supervisor.watch import DELETED, MOVED_FROM, MOVED_ITSELF, Watch
from vmsandbox.title import set_title
from vmsandbox_hypervisor.children import adopt_orphans
from vmsandbox_hypervisor.forking.fork import bind
from vmsandbox_hypervisor.qemu.template import STATE

if TYPE_CHECKING:
    from vmsandbox.paths import SandboxPaths

log = logging.getLogger(__name__)

#: seconds without a fork after which it ends
LINGER = 60.0
LOG = "keeper.log"
_PIECE = 64 * 1024


class _ToldToEnd(BaseException):
    """Somebody has ended this process."""


def keep(run_root: str, wanted: parents.Wish) -> bool:
    """Be the keeper of the parent that is wanted, unless somebody else is; whether there was one."""
    roots = Roots(run_root, wanted.data_root)
    paths = parents.place(roots, wanted.key, shareable=wanted.shareable)
    os.makedirs(roots.parents_dir, mode=0o700, exist_ok=True)
    os.makedirs(paths.dir, mode=0o700, exist_ok=True)
    with locks.opened(paths.lock_file) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        signal.signal(signal.SIGTERM, _end)
        set_title(f"vmsandbox parent {paths.directory.name}")
        try:
            _clear(paths)
            return _run(roots, paths, wanted)
        except _ToldToEnd:
            return True
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            machines.end_all(paths.dir)
            remains.remove_tree(paths.dir)


def _end(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise _ToldToEnd


def _clear(paths: SandboxPaths) -> None:
    """Remove what is left of a keeper that was killed."""
    machines.end_all(paths.dir)
    for entry in os.scandir(paths.dir):
        if entry.path != paths.lock_file:
            remains.remove_tree(entry.path)


def _run(roots: Roots, paths: SandboxPaths, wanted: parents.Wish) -> bool:
    with open(f"{roots.parents_dir}/{LOG}", "a") as file:
        logs.configure(file)
        logs.sandbox_id.set(paths.directory.name)
        # Another one in its place has the same key.
        state = str(roots.templates / wanted.key / STATE)
        saved = surroundings.change_of(state)
        try:
            with Watch() as watch:
                watch.add(roots.run_dir, MOVED_FROM | DELETED | MOVED_ITSELF)
                watch.add(str(roots.templates), MOVED_FROM | DELETED)
                machine = _made(roots, paths, wanted)
                if machine is None:
                    return False
                bind(machine["pid"])
                _offer(paths, wanted, machine)
                while surroundings.change_of(state) == saved and _is_of_use(paths, machine, watch):
                    continue
            return True
        except (SandboxError, OSError) as error:
            log.warning("no machine is kept to be forked: %s", error)
        except Exception:
            log.exception("the keeper failed")
        return False


def _made(roots: Roots, paths: SandboxPaths, wanted: parents.Wish) -> dict[str, Any] | None:
    """Have another process make the parent, so that what that takes is not kept; what there is to know of it."""
    adopt_orphans()
    ours, its = socket.socketpair()
    with ours, its:
        maker = os.fork()
        if maker == 0:
            # Whatever fails here must not go on as a second keeper.
            try:
                from vmsandbox.supervisor.standing import make

                ours.close()
                made = make(roots, paths, wanted, its)
                its.sendall(json.dumps(made).encode())
                os._exit(0)
            finally:
                os._exit(1)
        its.close()
        told = b""
        try:
            while part := ours.recv(_PIECE):
                told += part
        finally:
            ours.close()  # by which a maker that we do not wait for knows
            os.waitpid(maker, 0)
    machine: dict[str, Any] | None = json.loads(told) if told else None
    return machine


def _offer(paths: SandboxPaths, wanted: parents.Wish, machine: dict[str, Any]) -> None:
    me = os.getpid()
    offer = {
        "keeper": {"pid": me, "start_time": records.start_time(me)},
        "machine": machine,
        "shareable": wanted.shareable,
        "surroundings": surroundings.of(me, grouped=False),
    }
    documents.write(paths.offer_file, offer)


def _is_of_use(paths: SandboxPaths, machine: dict[str, Any], watch: Watch) -> bool:
    """Wait until something has to be looked at; whether the parent is there, and has been forked lately."""
    try:
        left = os.stat(paths.offer_file).st_mtime + LINGER - time.time()
        ended = os.pidfd_open(machine["pid"])
    except (FileNotFoundError, ProcessLookupError):  # somebody has removed the run root, or the machine has ended
        return False
    try:
        if left <= 0 or not records.is_alive(machine["pid"], machine["start_time"]):
            return False
        waiting = select.poll()
        waiting.register(ended, select.POLLIN)
        waiting.register(watch.fd, select.POLLIN)
        ready = dict(waiting.poll(left * 1000))
        if watch.fd in ready:
            watch.gone()
        return ended not in ready
    finally:
        os.close(ended)
