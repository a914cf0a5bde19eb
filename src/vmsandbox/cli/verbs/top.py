"""`vmsandbox top`: the processes of a container."""

from __future__ import annotations

import argparse
import json

from vmsandbox.arguments import Parser
from vmsandbox.cli import processes, table
from vmsandbox.cli.verbs._running import ask
from vmsandbox.errors import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmsandbox.cli.main import Options


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="vmsandbox top",
        allow_abbrev=False,
        description="Lists the processes of a container, by their pids inside. Options of ps(1) behind the container "
        "choose the columns: '-ef', 'aux', '-o pid,user,args'.",
    )
    made.add_argument("--format", choices=("table", "json"), default="table")
    made.add_argument("container", metavar="CONTAINER")
    made.add_argument("ps", nargs=argparse.REMAINDER, metavar="PS OPTIONS")
    return made


def main(options: Options, argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    chosen = processes.columns(arguments.ps) if arguments.ps else []
    request = {"verb": "top"}
    rows = ask(options.roots(), arguments.container, request, wanted="list the processes of")["processes"]
    if arguments.format == "json":
        print(json.dumps(rows, indent=2))
    elif chosen:
        print(processes.table(rows, chosen))
    else:
        print(table.aligned([HEAD, *(line(row) for row in rows)]))
    return 0


HEAD = ("USER", "PID", "PPID", "STATE", "RSS", "TTY", "TIME", "COMMAND")


def line(row: dict[str, Any]) -> tuple[str, ...]:
    cells = (
        row["user"] or row["uid"],
        row["pid"],
        row["parent_pid"],
        row["state"],
        table.amount(row["rss_kib"] * 1024),
        row["tty"] or "?",
        cpu_time(row["cpu_ms"]),
        row["command"],
    )
    return tuple(printable(str(cell)) for cell in cells)


def cpu_time(milliseconds: int) -> str:
    """As ps shows it: hours, minutes, seconds."""
    minutes, seconds = divmod(milliseconds // 1000, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}"
