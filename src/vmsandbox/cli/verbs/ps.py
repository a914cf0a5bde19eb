"""`vmsandbox ps`: which containers there are, by their documents and stand-ins alone."""

from __future__ import annotations

import sys
import time

from vmsandbox import plainjson, records
from vmsandbox.cli.table import aligned
from vmsandbox.errors import InvalidArgumentError, SandboxError, one_line, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmsandbox.cli.main import Options

USAGE = """usage: vmsandbox ps [-a] [-q] [--no-trunc] [--format table|json]

Lists running containers.
  -a, --all      stopped ones as well
  -q, --quiet    ids only
  --no-trunc     whole ids and commands
  --format       table (default) or json"""
COMMAND_WIDTH = 30


def main(options: Options, argv: list[str]) -> int:
    flags = parse(argv)
    if flags is None:
        print(USAGE)
        return 0
    rows = []
    for container in records.containers(options.roots()):
        if isinstance(container, SandboxError):
            print(f"vmsandbox: {one_line(container)}", file=sys.stderr)
            continue
        status = container.status()
        if status != "stopped" or "all" in flags:
            rows.append(row(container, status))
    rows.sort(key=lambda row: -row["created"])
    if "quiet" in flags:
        for entry in rows:
            print(entry["id"] if "no-trunc" in flags else entry["id"][: records.SHOWN_ID])
    elif "json" in flags:
        import json

        print(json.dumps(rows, indent=2))
    else:
        table(rows, whole="no-trunc" in flags)
    return 0


def parse(argv: list[str]) -> set[str] | None:
    """The flags given; None for help.  By hand: importing argparse costs more than the rest of `ps`."""
    flags = set()
    short = {"a": "all", "q": "quiet"}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            return None
        name, equals, value = word.partition("=")
        if name == "--format":
            value = value if equals else (words.pop(0) if words else "")
            if value not in ("table", "json"):
                raise InvalidArgumentError(f"unknown format '{value}': 'table' or 'json'")
            flags.add(value)
        elif word in ("--all", "--quiet", "--no-trunc"):
            flags.add(word[2:])
        elif word.startswith("-") and not word.startswith("--") and word[1:] and set(word[1:]) <= set(short):
            flags |= {short[letter] for letter in word[1:]}
        else:
            raise InvalidArgumentError(f"unknown argument '{word}': 'vmsandbox ps --help' lists them")
    return flags


def row(container: records.Container, status: str) -> dict[str, Any]:
    document = container.document
    return {
        "id": container.id,
        "name": container.name,
        "pod": document.get("pod_name", ""),
        "image": (document.get("image") or {}).get("name", ""),
        "command": document.get("args") or [],
        "created": document.get("created") or 0,
        "status": status,
        "exit_code": (document.get("exit") or {}).get("code") if status == "stopped" else None,
        "finished": document.get("finished"),
        "started": document.get("started"),
        "pid": (document.get("standin") or {}).get("pid", 0) if status != "stopped" else 0,
    }


def ago(since: float | None) -> str:
    """A duration as people say it."""
    seconds = max(0, int(time.time() - (since or 0)))
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = seconds // size
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return f"{seconds} second{'s' if seconds != 1 else ''}"


def status_text(entry: dict[str, Any]) -> str:
    if entry["status"] == "stopped":
        code = "?" if entry["exit_code"] is None else entry["exit_code"]
        return f"Exited ({code}) {ago(entry['finished'] or entry['created'])} ago"
    if entry["status"] == "running":
        return f"Up {ago(entry['started'])}"
    return str(entry["status"]).capitalize()


def table(rows: list[dict[str, Any]], *, whole: bool) -> None:
    lines = [("CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "POD", "NAME")]
    for entry in rows:
        command = " ".join(entry["command"])
        if not whole and len(command) > COMMAND_WIDTH:
            command = command[: COMMAND_WIDTH - 1] + "…"
        lines.append(
            (
                entry["id"] if whole else entry["id"][: records.SHOWN_ID],
                entry["image"],
                printable(plainjson.quoted(command)),
                f"{ago(entry['created'])} ago",
                status_text(entry),
                entry["pod"],
                entry["name"],
            )
        )
    print(aligned(lines))
