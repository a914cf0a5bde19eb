"""The PID namespace that the containers of a pod can share: somebody has to be its PID 1.

A namespace begins with the first child of a thread that asked for it, and a fork is not possible here; so a
thread of its own asks and spawns the holder, a program that does nothing but exist.  Orphans are reaped by the
kernel, because the holder ignores SIGCHLD.
"""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vmsandbox_agent.errors import AgentError
from vmsandbox_agent.syscalls import begin_pid_namespace

if TYPE_CHECKING:
    from vmsandbox_agent.reaper import Reaper

_HOLDER = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True: signal.pause()"


def start_holder(reaper: Reaper) -> int:
    """Start a new PID namespace; answers the pid of the process that keeps it."""
    pids: list[int] = []
    failures: list[OSError] = []

    def start() -> None:
        try:
            begin_pid_namespace()
            argv = [sys.executable or "/usr/bin/python3", "-I", "-S", "-B", "-c", _HOLDER]
            pids.append(reaper.spawn(argv, env={}).pid)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=start, name="pid-holder")
    thread.start()
    thread.join()
    if failures:
        raise AgentError(f"cannot make a shared PID namespace: {failures[0].strerror}") from failures[0]
    with suppress(OSError):  # all containers end with it, so the kernel shall take another one's memory
        Path(f"/proc/{pids[0]}/oom_score_adj").write_text("-1000")
    return pids[0]
