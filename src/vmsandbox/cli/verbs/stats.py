"""`vmsandbox stats`: how much of its resources a container uses, once or again every second."""

from __future__ import annotations

import json
import sys
import time

from vmsandbox import records
from vmsandbox.arguments import Parser
from vmsandbox.cli import table
from vmsandbox.cli.verbs._running import ask_about, stopped_error
from vmsandbox.errors import InvalidStateError, NotFoundError, SandboxError, UnavailableError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from vmsandbox.cli.main import Options
    from vmsandbox.paths import Roots

#: seconds between two readings, and so what a rate is an average of
INTERVAL = 1.0
HEAD = ("CONTAINER ID", "NAME", "CPU %", "MEM USAGE / LIMIT", "MEM %", "BLOCK I/O", "PIDS")
#: clears a terminal and starts at its top
CLEAR = "\033[H\033[J"


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="vmsandbox stats",
        description="Shows what containers use (all running ones by default), again every second.",
    )
    made.add_argument("--no-stream", action="store_true", help="show it once")
    made.add_argument("--format", choices=("table", "json"), default="table", help="json: a line for each reading")
    made.add_argument("containers", nargs="*", metavar="CONTAINER")
    return made


def main(options: Options, argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    roots = options.roots()
    wanted = [records.load(roots, records.resolve(roots, name)) for name in arguments.containers]
    for name, container in zip(arguments.containers, wanted, strict=True):
        if container.status() == "stopped":
            raise stopped_error(name, wanted="show what is used by")
    before = read(roots, wanted if arguments.containers else running(roots))
    while True:
        time.sleep(INTERVAL)
        after = read(roots, wanted if arguments.containers else running(roots))
        rows = [row(container, before.get(container.id), reading) for container, reading in after.values()]
        show(rows, arguments)
        if arguments.no_stream or (arguments.containers and not rows):
            return 0
        before = after


def running(roots: Roots) -> list[records.Container]:
    return [
        container
        for container in records.containers(roots)
        if not isinstance(container, SandboxError) and container.status() in ("running", "paused")
    ]


def read(roots: Roots, containers: list[records.Container]) -> dict[str, tuple[records.Container, dict[str, Any]]]:
    """A reading of each container; one that ends meanwhile is left out."""
    found = {}
    for container in containers:
        try:
            answer = ask_about(roots, container, {"verb": "stats"}, name=container.id, wanted="read")
        except (InvalidStateError, NotFoundError, UnavailableError):
            continue
        found[container.id] = (container, answer["stats"])
    return found


def row(
    container: records.Container,
    before: tuple[records.Container, dict[str, Any]] | None,
    reading: dict[str, Any],
) -> dict[str, Any]:
    """What is shown, and under its counters' own names what it was made of."""
    limit = reading["memory_limit_bytes"] or reading["pod_memory_bytes"]
    used = max(0, reading["memory_bytes"] - reading["memory_stat"].get("inactive_file", 0))
    counters = {key: value for key, value in reading.items() if key != "memory_stat"}
    return {
        "id": container.id,
        "name": container.name,
        "cpu_percent": cpu_percent(before[1] if before else None, reading),
        "memory_used_bytes": used,
        "memory_percent": round(100 * used / limit, 2) if limit else 0.0,
        **counters,
    }


def cpu_percent(before: dict[str, Any] | None, after: dict[str, Any]) -> float:
    """Of one vCPU, between two readings; 0 without a first one."""
    if before is None:
        return 0.0
    elapsed_us = (after["time_ns"] - before["time_ns"]) / 1000
    used_us = after["cpu_usage_us"] - before["cpu_usage_us"]
    return round(max(0.0, 100 * used_us / elapsed_us), 2) if elapsed_us > 0 else 0.0


def show(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    if arguments.format == "json":
        print(json.dumps(rows, indent=2 if arguments.no_stream else None), flush=True)
        return
    if not arguments.no_stream and sys.stdout.isatty():
        sys.stdout.write(CLEAR)
    print(table.aligned([HEAD, *(line(entry) for entry in rows)]), flush=True)


def line(entry: dict[str, Any]) -> tuple[str, ...]:
    limit = entry["memory_limit_bytes"] or entry["pod_memory_bytes"]
    return (
        entry["id"][: records.SHOWN_ID],
        entry["name"],
        f"{entry['cpu_percent']:.2f}%",
        f"{table.amount(entry['memory_used_bytes'])} / {table.amount(limit)}",
        f"{entry['memory_percent']:.2f}%",
        f"{table.amount(entry['io_read_bytes'])} / {table.amount(entry['io_write_bytes'])}",
        str(entry["pids"]),
    )
