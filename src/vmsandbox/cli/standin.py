"""The host process that stands for a process in the guest, as whoever forks it sees it.

It is forked from `run` or `exec` before anything heavy is imported; what it does then is `carrying`, which it loads
itself, beside the work of the process that forked it.
"""

from __future__ import annotations

import fcntl
import os
import sys
import termios

from vmsandbox import cgroups
from vmsandbox.errors import refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

    from vmsandbox.paths import Roots, SandboxPaths

#: Exit status when the pod is lost and nobody can say how the process ended.
LOST = 255
#: instead of a root: nothing but processes
EMPTY = "(empty)"


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
