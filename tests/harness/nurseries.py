"""The processes that fork supervisors, as tests see them."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil

from tests.harness.cli import TIMEOUT, awaited, title
from vmsandbox import wire


def nursery(run_root: Path) -> int:
    """The pid of this run root's nursery."""
    found = [process.pid for process in psutil.process_iter() if title(process) == f"vmsandbox nursery {run_root}"]
    (pid,) = found
    return pid


def with_title(wanted: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if title(process) == wanted]


def end_nursery(run_root: Path) -> None:
    """Have nothing made any more that nobody has asked for.

    Without its socket a nursery ends by itself.  By its name it could not be killed: what it forks has that too until
    it is something else, and a maker that dies between two steps leaves a directory that gc takes for unfinished.
    """
    (run_root / "nursery.sock").unlink(missing_ok=True)
    awaited(lambda: not with_title(f"vmsandbox nursery {run_root}"))


def await_nursery(run_root: Path) -> None:
    """Wait until this run root's nursery has loaded what it forks: only then does it answer or hang up."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect(f"{run_root}/nursery.sock")
        wire.receive(sock)


def is_nursery(process: psutil.Process) -> bool:
    """Whether it ends by itself once nobody has wanted a supervisor for a while."""
    return title(process).startswith("vmsandbox nursery ")


def origin(pid: int) -> str:
    """The random address of a process' arguments, which it has in common with those that it forked alone."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[45]
