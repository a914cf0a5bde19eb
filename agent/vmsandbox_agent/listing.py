"""A container's processes as ps shows them, read from /proc.

Everything here is written by the container's processes or races with their end: a process that goes while it is read is
left out, and texts are cut.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vmsandbox_agent import users

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PROC = Path("/proc")
_COMMAND_LIMIT = 4096
_PTS_MAJORS = range(136, 144)


class Row(NamedTuple):
    """One process; times in the unit of their names, `pid` in the container's namespace."""

    pid: int
    guest_pid: int
    parent_pid: int
    uid: int
    state: str
    cpu_ms: int
    rss_kib: int
    start_time_ns: int
    tty: str
    command: str
    exec_id: str
    user: str


def rows(pids: Sequence[int], execs: Mapping[int, str], root: int, *, proc: Path = PROC) -> list[Row]:
    """Describe the processes; `execs` says which exec a pid is, `root` is the container's root directory."""
    names: dict[int, str] = {}
    boot_ns = _boot_time_ns(proc)
    found = []
    for pid in sorted(set(pids)):
        try:
            found.append(_row(proc / str(pid), pid, execs, boot_ns, names, root))
        except (OSError, ValueError, IndexError):
            continue
    return found


def _row(directory: Path, pid: int, execs: Mapping[int, str], boot_ns: int, names: dict[int, str], root: int) -> Row:
    stat = (directory / "stat").read_text(errors="replace")
    name = stat[stat.index("(") + 1 : stat.rindex(")")]
    fields = stat[stat.rindex(")") + 1 :].split()
    status = (directory / "status").read_text(errors="replace")
    uid = int(_field(status, "Uid").split()[1])
    command = (directory / "cmdline").read_bytes()[:_COMMAND_LIMIT].rstrip(b"\0").replace(b"\0", b" ")
    tick = os.sysconf("SC_CLK_TCK")
    if uid not in names:
        names[uid] = users.name_of(root, uid)
    return Row(
        pid=int(_field(status, "NSpid").split()[-1]),
        guest_pid=pid,
        parent_pid=int(fields[1]),
        uid=uid,
        state=fields[0],
        cpu_ms=(int(fields[11]) + int(fields[12])) * 1000 // tick,
        rss_kib=int(fields[21]) * os.sysconf("SC_PAGE_SIZE") // 1024,
        start_time_ns=boot_ns + int(fields[19]) * 1_000_000_000 // tick,
        tty=_tty(int(fields[4])),
        command=command.decode(errors="replace") or f"[{name}]",
        exec_id=execs.get(pid, ""),
        user=names[uid],
    )


def _field(status: str, name: str) -> str:
    found = re.search(rf"^{name}:\s*(.*)$", status, re.MULTILINE)
    if found is None:
        raise ValueError(name)
    return found[1]


def _tty(number: int) -> str:
    if number == 0:
        return "?"
    major, minor = os.major(number), os.minor(number)
    if major in _PTS_MAJORS:
        return f"pts/{minor + 256 * (major - _PTS_MAJORS.start)}"
    return "console" if (major, minor) == (5, 1) else f"{major}:{minor}"


def _boot_time_ns(proc: Path) -> int:
    try:
        stat = (proc / "stat").read_text()
    except OSError:
        return 0
    found = re.search(r"^btime (\d+)$", stat, re.MULTILINE)
    return int(found[1]) * 1_000_000_000 if found else 0
