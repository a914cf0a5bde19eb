"""The guest's processes as ps(1) would show them."""

from __future__ import annotations

import time
from typing import Any

import pytest

from vmsandbox.cli import processes
from vmsandbox.errors import UnsupportedError


def row(**changes: Any) -> dict[str, Any]:
    made = {
        "pid": 1, "parent_pid": 0, "uid": 0, "user": "root", "state": "S", "cpu_ms": 61_000, "rss_kib": 1024,
        "start_time_ns": time.time_ns() - 100_000_000_000, "tty": "", "command": "/bin/sleep 1000",
    }  # fmt: skip
    return {**made, **changes}


@pytest.mark.parametrize(
    ("words", "headings"),
    [
        ([], ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]),
        (["-ef"], ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]),
        (["-e"], ["PID", "TTY", "TIME", "CMD"]),
        (["aux"], ["USER", "PID", "%CPU", "RSS", "TTY", "STAT", "STIME", "TIME", "COMMAND"]),
        (["-eo", "pid,args"], ["PID", "COMMAND"]),
        (["-o", "pid=", "-o", "user=WHO,etime"], ["PID", "WHO", "ELAPSED"]),
    ],
)
def test_arguments_of_ps_choose_columns(words: list[str], headings: list[str]) -> None:
    assert processes.table([], processes.columns(words)).split() == headings


@pytest.mark.parametrize("words", [["-p", "1"], ["--pid", "1"], ["-o", "nosuch"], ["-C", "sh"], ["f"], ["-o"], ["u1"]])
def test_what_ps_alone_can_do_is_refused(words: list[str]) -> None:
    with pytest.raises(UnsupportedError, match=r"ps\(1\)"):
        processes.columns(words)


def test_rows_are_aligned_and_cannot_change_the_terminal() -> None:
    rows = [row(), row(pid=12345, command="\x1b[2Jevil")]
    said = processes.table(rows, processes.columns(["-o", "pid,time,etime,args"])).splitlines()
    assert said == [
        "  PID TIME     ELAPSED COMMAND",
        "    1 00:01:01   01:40 /bin/sleep 1000",
        r"12345 00:01:01   01:40 \x1b[2Jevil",
    ]
