"""A stand-in's way out of its namespaces: a process outside that finds, or starts, the pod's supervisor for it.

Children of a process in a pid namespace are in it too, and a supervisor in there would know neither the machine nor
the stand-ins by their pids.  So this is forked before the stand-in enters anything; it answers with connections, and
ends when the stand-in has.
"""

from __future__ import annotations

import os

from vmsandbox import cgroups
from vmsandbox.cli import launch
from vmsandbox.plainsocket import SOCK_SEQPACKET, UnixSocket, pair, receive_descriptor, send_descriptors
from vmsandbox.title import set_title

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

    from vmsandbox.paths import Roots, SandboxPaths

QUESTION, FOUND, GONE = b"?", b"+", b"-"


class StarterDiedError(Exception):
    """Nobody is left outside who could start a supervisor."""


def fork(roots: Roots, sandbox: SandboxPaths, container_id: str, places: Sequence[str]) -> int:
    """Fork it, into cgroups as well; answers the descriptor by which the stand-in asks."""
    ours, its = pair(SOCK_SEQPACKET)
    if not os.fork():
        try:
            os.setsid()
            _keep_only(its.fileno())
            cgroups.enter(places)
            set_title(f"vmsandbox starter {container_id[:12]}")
            _serve(its, roots, sandbox)
        finally:
            os._exit(0)
    its.close()
    return ours.detach()


def ask(fd: int) -> UnixSocket:
    """A connection to the supervisor; OSError where the pod is gone, `StarterDiedError` where the answer is."""
    with UnixSocket(SOCK_SEQPACKET, fileno=os.dup(fd)) as sock:
        try:
            sock.send(QUESTION)
            said, found = receive_descriptor(sock, 1)
        except OSError as error:
            raise StarterDiedError from error
    if said == GONE:
        raise FileNotFoundError("the pod is gone")
    if said != FOUND or found < 0:
        raise StarterDiedError
    return UnixSocket(fileno=found)


def _serve(sock: UnixSocket, roots: Roots, sandbox: SandboxPaths) -> NoReturn:
    while sock.recv(1):
        _reap()
        try:
            found = launch.connect_or_take_over(roots, sandbox)
        except OSError:
            sock.send(GONE)
            continue
        with found:
            send_descriptors(sock, FOUND, [found.fileno()])
    os._exit(0)


def _reap() -> None:
    """Let go of the supervisors that were started before and have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _keep_only(kept: int) -> None:
    """Close what was inherited: whoever reads a pipe to its end must not wait for us."""
    devnull = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(devnull, fd)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd != kept:
            try:
                os.close(fd)
            except OSError:
                continue
