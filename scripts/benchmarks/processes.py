"""Starting programs, timing them, and asking the kernel what processes have used.

The benchmark is a child subreaper: whatever a command leaves running becomes its child, so that nothing escapes the
accounting and nothing is left behind.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

PR_SET_CHILD_SUBREAPER = 36
TICKS = os.sysconf("SC_CLK_TCK")


class CommandError(Exception):
    """A command failed that had to work; the message has the last of what it said."""


@dataclass(frozen=True)
class Reaped:
    """A process that ended: the CPU seconds of itself and all it waited for, and of the latter alone."""

    pid: int
    name: str
    total: float
    children: float


@dataclass(frozen=True)
class Ended:
    """A command's end, `seconds` after its start (on `time.monotonic`)."""

    started: float
    seconds: float
    output: str
    reaped: list[Reaped] = field(default_factory=list)


def become_subreaper() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def spawn(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    files: Mapping[int, int] | None = None,
) -> int:
    """Start a program with /dev/null for the standard streams not given; `files` maps its descriptors to ours."""
    actions: list[tuple[int, int, str, int, int] | tuple[int, int, int]] = []
    for target, source in enumerate((stdin, stdout, stderr)):
        if source is None:
            actions.append((os.POSIX_SPAWN_OPEN, target, os.devnull, os.O_RDWR, 0))
        else:
            actions.append((os.POSIX_SPAWN_DUP2, source, target))
    actions += [(os.POSIX_SPAWN_DUP2, source, target) for target, source in (files or {}).items()]
    return os.posix_spawnp(argv[0], list(argv), environment or os.environ, file_actions=actions)


def run(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    settle: bool = False,
    dismiss: Callable[[set[int]], None] = lambda _: None,
) -> Ended:
    """Run a command to its end and time it; `CommandError` if it fails.

    With `settle`, also wait for everything it left running and account for it; the time is the command's alone.
    `dismiss` is told what is left, and may end those of them that wait for nothing but the next command.
    """
    before = set(children()) if settle else set()
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        started = time.monotonic()
        pid = spawn(argv, environment=environment, stdout=stdout.fileno(), stderr=stderr.fileno())
        try:
            # Left a zombie: its children become ours now, and /proc still tells what it used.
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            seconds = time.monotonic() - started
        except BaseException:
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
            raise
        first, status = reap(pid)
        reaped = [first]
        while settle and (left := set(children()) - before):
            dismiss(left)
            reaped += [reap(child)[0] for child in left]
        if status != 0:
            stderr.seek(0)
            raise CommandError(f"'{' '.join(argv)}' {described(status)}: {last_line(stderr.read())}")
        stdout.seek(0)
        return Ended(started, seconds, stdout.read().decode(errors="replace"), reaped)


def run_together(commands: Sequence[Sequence[str]]) -> float:
    """Start all commands at once; seconds until the last has ended.  `CommandError` if one fails."""
    pids: list[int] = []
    with tempfile.TemporaryFile() as stderr:
        began = time.monotonic()
        try:
            for argv in commands:
                pids.append(spawn(argv, stderr=stderr.fileno()))
        finally:
            statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        seconds = time.monotonic() - began
        failed = [status for status in statuses if status != 0]
        if failed:
            stderr.seek(0)
            raise CommandError(f"{len(failed)} of {len(commands)} commands failed: {last_line(stderr.read())}")
    return seconds


def last_line(output: bytes) -> str:
    """What a command said last."""
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def described(status: int) -> str:
    return f"ended with status {status}" if status > 0 else f"was killed by signal {-status}"


def reap(pid: int) -> tuple[Reaped, int]:
    """Wait for a child; its accounts, and its status as in `subprocess`."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    stat = read_stat(pid)
    _, status, usage = os.wait4(pid, 0)
    accounts = Reaped(pid, stat.name, usage.ru_utime + usage.ru_stime, stat.children_seconds)
    return accounts, os.waitstatus_to_exitcode(status)


@dataclass(frozen=True)
class Stat:
    """What /proc/PID/stat tells."""

    name: str
    state: str
    parent: int
    seconds: float
    children_seconds: float


def read_stat(pid: int) -> Stat:
    """Raises `OSError` if there is no such process."""
    return parse_stat(Path(f"/proc/{pid}/stat").read_text(errors="replace"))


def parse_stat(text: str) -> Stat:
    """CPU times have the resolution of a clock tick."""
    head, _, tail = text.rpartition(") ")
    fields = tail.split()
    return Stat(
        name=head.partition(" (")[2],
        state=fields[0],
        parent=int(fields[1]),
        seconds=(int(fields[11]) + int(fields[12])) / TICKS,
        children_seconds=(int(fields[13]) + int(fields[14])) / TICKS,
    )


def table() -> dict[int, Stat]:
    """Every process there is."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                found[int(entry)] = read_stat(int(entry))
    return found


def children(pid: int | None = None) -> list[int]:
    """The children of a process, by default of this one."""
    parent = os.getpid() if pid is None else pid
    return [child for child, stat in table().items() if stat.parent == parent]


def descendants(pids: set[int]) -> set[int]:
    """These processes and all below them that live."""
    known = table()
    found = {pid for pid in pids if pid in known and known[pid].state not in "ZX"}
    while True:
        more = {pid for pid, stat in known.items() if stat.parent in found and stat.state not in "ZX"} - found
        if not more:
            return found
        found |= more


def cpu_seconds(pids: set[int]) -> float:
    """CPU time that the threads of these processes have had, to the nanosecond (/proc/PID/task/TID/schedstat)."""
    total = 0
    for pid in pids:
        for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with suppress(OSError):
                total += int(path.read_text().split()[0])
    return total / 1e9


def end(pids: set[int]) -> None:
    """Kill these processes, all of them ours, and reap those that are our children."""
    for pid in descendants(pids):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for child in children():
        if child in pids or read_stat(child).state == "Z":
            with suppress(ChildProcessError):
                os.waitpid(child, 0)


def reap_zombies() -> None:
    """Collect what ended since, so that no pid is mistaken for a live one."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def note(text: str) -> None:
    """Tell the person who waits, apart from the report."""
    print(text, file=sys.stderr, flush=True)
