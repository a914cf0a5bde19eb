"""The host process that stands for a process in the guest, as whoever forks it sees it.

It is forked from `run` or `exec` before anything heavy is imported; what it does then is `carrying`, which it loads
itself, beside the work of the process that forked it.  One that has nothing of its caller's comes out of the nursery,
if there is one: what it has loaded, most of its memory, is shared then with all others.
"""

from __future__ import annotations

import fcntl
import os
import sys
import termios

from vmsandbox import cgroups
from vmsandbox.errors import refused
from vmsandbox.paths import Roots, SandboxPaths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

#: Exit status when the pod is lost and nobody can say how the process ended.
LOST = 255
#: instead of a root: nothing but processes
EMPTY = "(empty)"
_SIGKILL = 9


class Plan:
    """Which process this stand-in is for, and what of its stdio is connected."""

    __slots__ = (
        "cgroups",
        "client",
        "command",
        "container_id",
        "controlling",
        "ends_with_client",
        "exec_id",
        "mode",
        "root",
        "starter",
        "stdin",
        "stdout",
        "terminal",
    )

    def __init__(
        self,
        container_id: str,
        exec_id: str = "",
        *,
        stdin: bool,
        stdout: bool,
        terminal: bool,
        client: int | None = None,
        ends_with_client: bool = False,
        controlling: bool = False,
        root: str = "",
        command: str = "",
        cgroups: Sequence[str] = (),
    ) -> None:
        self.container_id = container_id
        self.exec_id = exec_id
        self.stdin = stdin
        #: False: output goes to the log only
        self.stdout = stdout
        self.terminal = terminal
        #: in the foreground, whose stdio this is: when it dies we have none any more
        self.client = client
        #: the process is killed when its client dies
        self.ends_with_client = ends_with_client
        #: of the terminal on stdin while nobody has it: a client that is killed cannot give it back
        self.mode: list[Any] | None = None
        #: stdin is a terminal of our own making: it tells us its size and when its other side is gone
        self.controlling = controlling
        #: by which a process outside of our namespaces is asked for the supervisor; -1: we are in none of our own
        self.starter = -1
        #: what runs in the guest, for people who list processes
        self.command = command
        #: the directory that is to be all it sees of the host's files; empty: it sees them all
        self.root = root
        #: where engines look for it: it is in there before it says that it is ready
        self.cgroups = cgroups


def fork(roots: Roots, sandbox: SandboxPaths, plan: Plan) -> int:
    """Fork the stand-in and return its pid; it never returns into the caller's code."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        stay(roots, sandbox, plan)
    return pid


def of_client(roots: Roots, sandbox: SandboxPaths, plan: Plan, *, detach: bool) -> int:
    """The pid of a stand-in that is our child or, detached, has none of our stdio and may be anybody's."""
    from vmsandbox.cli import foreground

    if detach:
        return _detached(roots, sandbox, plan)
    with foreground.held_back():
        return fork(roots, sandbox, plan)


def _detached(roots: Roots, sandbox: SandboxPaths, plan: Plan) -> int:
    from vmsandbox import wire
    from vmsandbox.cli import launch, nursery

    words = (roots.run_dir, roots.data_dir, sandbox.dir, plan.container_id, plan.exec_id)
    try:
        pid = nursery.standin(roots, words, launch.environment())
    except (OSError, ValueError, KeyError, wire.WireError) as error:
        raise launch.broken(error) from error
    if pid is not None:
        return pid
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        stay_detached(words)
    return pid


def stay_detached(words: Sequence[str]) -> NoReturn:
    """Be a stand-in that has nothing of its client's from now on, as the `words` of `_detached` say."""
    run_dir, data_dir, directory, container_id, exec_id = words
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    plan = Plan(container_id, exec_id, stdin=False, stdout=False, terminal=False)
    stay(Roots(run_dir, data_dir), SandboxPaths(directory), plan)


def end(pid: int) -> None:
    """Kill the stand-in of a process that never came to be."""
    try:
        os.kill(pid, _SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return  # the nursery has forked it


def load() -> None:
    """Load what a stand-in needs."""
    from vmsandbox.cli import carrying  # noqa: F401


def stay(roots: Roots, sandbox: SandboxPaths, plan: Plan) -> NoReturn:
    """Be the stand-in from now on, and end as its process does."""
    status = LOST
    try:
        cgroups.enter(plan.cgroups)
        from vmsandbox.cli.carrying import Standin

        os.setsid()
        if plan.controlling:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        status = Standin(roots, sandbox, plan).run()
    except BrokenPipeError:
        pass
    except OSError as error:
        if plan.client is not None:
            from vmsandbox.cli import output

            output.report(refused(error, wanted="carry its input and output"), debug=False)
            status = output.ENGINE_FAILED
    finally:
        os._exit(status)
