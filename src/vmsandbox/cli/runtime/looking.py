"""`state`, `list`, `ps` and `events`: what runc prints, field by field."""

from __future__ import annotations

import time

from vmsandbox import plainjson, records
from vmsandbox.cli.runtime import known
from vmsandbox.cli.runtime.main import report, stamp
from vmsandbox.cli.runtime.options import FLAG, VALUE, parse
from vmsandbox.errors import InvalidArgumentError, NotFoundError, SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from vmsandbox.cli.runtime.main import Options
    from vmsandbox.paths import Roots

#: as Go writes "no limit"
MOST = 2**64 - 1


def _row(container: records.Container) -> dict[str, Any]:
    document = container.document
    row = {
        "ociVersion": document["oci_version"],
        "id": container.id,
        "pid": known.pid_of(container),
        "status": container.status(),
        "bundle": document["bundle"],
        "rootfs": document["rootfs"],
        "created": stamp(float(document["created"])),
    }
    if document.get("annotations"):
        row["annotations"] = document["annotations"]
    row["owner"] = ""
    return row


def state_verb(options: Options, argv: list[str]) -> int:
    given = parse(argv, {})
    container = known.find(options.roots(), known.one(given.positional))
    print(plainjson.indented(_row(container)))
    return 0


def list_verb(options: Options, argv: list[str]) -> int:
    given = parse(argv, {"format": VALUE, "quiet": FLAG}, short={"f": "format", "q": "quiet"})
    kind = given.text("format", "table")
    if kind not in ("table", "json"):
        raise InvalidArgumentError("invalid format option")
    rows = _rows(options)
    if given.flag("quiet"):
        for row in rows:
            print(row["id"])
    elif kind == "json":
        import json

        print(json.dumps(rows, separators=(",", ":"), ensure_ascii=False) if rows else "null")
    else:
        names = ("id", "pid", "status", "bundle", "created", "owner")
        table = [[name.upper() for name in names], *([str(row[name]) for name in names] for row in rows)]
        widths = [max(12, *(len(line[column]) + 3 for line in table)) for column in range(len(names))]
        for line in table:
            print("".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    return 0


def _rows(options: Options) -> list[dict[str, Any]]:
    """What can be told of each container; of a broken one, which runc lists as little, why it cannot."""
    rows = []
    for each in records.containers(options.roots()):
        if isinstance(each, SandboxError):
            report(options, f"load container broken: {each}")
        elif each.document.get("kind") == "bundle":
            try:
                rows.append({**_row(each), "owner": "root"})
            except KeyError as error:
                report(options, f"load container broken: the document of '{each.id}' has no {error}")
    return rows


def ps_verb(options: Options, argv: list[str]) -> int:
    """The stand-ins' pids for programs that want the host's, what runs in the guest for people."""
    given = parse(argv, {"format": VALUE}, short={"f": "format"}, stop_after=1)
    kind = given.text("format", "table")
    words = list(given.positional)
    if words[1:2] == ["--"]:
        del words[1]
    while len(words) > 1 and words[1].partition("=")[0] in ("--format", "-f"):
        _, equals, value = words.pop(1).partition("=")
        kind = value if equals else words.pop(1) if len(words) > 1 else kind
    if kind not in ("table", "json"):
        raise InvalidArgumentError("invalid format option")
    # Late, because engines ask for pids only.
    from vmsandbox.cli import processes

    chosen = processes.columns(words[1:])
    roots = options.roots()
    container = known.find(roots, words[0] if words else "")
    if kind == "json":
        pids = _pids(container)
        print(f"[{', '.join(map(str, pids))}]" if pids else "null")
        return 0
    rows: list[dict[str, Any]] = []
    if container.status() != "stopped":
        try:
            rows = known.ask(roots, container, {"verb": "top"}, stopped="container not running")["processes"]
        except SandboxError:
            if known.find(roots, container.id).status() != "stopped":
                raise
    print(processes.table(rows, chosen))
    return 0


def _pids(container: records.Container) -> list[int]:
    standing = [container.document.get("standin") or {}]
    standing += [each.get("standin") or {} for each in (container.document.get("execs") or {}).values()]
    return [each["pid"] for each in standing if records.is_alive(each.get("pid"), each.get("start_time"))]


# ---------------------------------------------------------------- events


def events_verb(options: Options, argv: list[str]) -> int:
    """One reading with `--stats`, else one every interval, and a line for each OOM kill, until the container ends."""
    given = parse(argv, {"stats": FLAG, "interval": VALUE})
    interval = _seconds(given.text("interval", "5s"))
    roots = options.roots()
    container_id = known.one(given.positional)
    container = known.find(roots, container_id)
    if container.status() == "stopped":
        raise known.StoppedError(_not_running(container))
    if given.flag("stats"):
        _print(_stats(roots, container))
        return 0
    told: list[str] = []
    try:
        _follow(roots, container, interval, told)
    except SandboxError:
        # It ends while it is asked; what was killed last is in its document then.
        try:
            container = known.find(roots, container_id)
        except NotFoundError:
            return 0
        if container.status() != "stopped":
            raise
        document = container.document
        # One that was told of just before the end is the end's.
        at_end = (document.get("exit") or {}).get("oom_killed") and told[-1:] != ["oom"]
        if at_end or (document.get("oom_killed") and "oom" not in told):
            _print({"type": "oom", "id": container_id})
    return 0


def _not_running(container: records.Container) -> str:
    return f"container with id {container.id} is not running"


def _follow(roots: Roots, container: records.Container, interval: float, told: list[str]) -> NoReturn:
    """Print until the container ends, which is an error; `told` gets the kinds of what was printed, in a row once."""
    stopped = _not_running(container)
    killed = known.ask(roots, container, {"verb": "oom"}, stopped=stopped)["oom_kills"]
    due = time.monotonic()
    while True:
        if time.monotonic() >= due:
            _print(_stats(roots, container))
            told += [] if told[-1:] == ["stats"] else ["stats"]
            due = time.monotonic() + interval
        request = {"verb": "oom", "seen": killed, "timeout": max(0.0, due - time.monotonic())}
        found = known.ask(roots, container, request, stopped=stopped)["oom_kills"]
        container = known.find(roots, container.id)
        if found > killed and container.status() != "stopped":
            _print({"type": "oom", "id": container.id})
            told.append("oom")
        killed = found


def _print(event: dict[str, Any]) -> None:
    import json

    print(json.dumps(event, separators=(",", ":")), flush=True)


def _seconds(text: str) -> float:
    """A duration as Go writes it: ``5s``, ``1m30s``, ``1.5h``."""
    import re

    units = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
    one = r"([0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})(ns|us|µs|ms|s|m|h)"
    seconds = sum(float(digits) * units[unit] for digits, unit in re.findall(one, text))
    if not re.fullmatch(f"\\+?(?:{one})+", text) or not seconds:
        raise InvalidArgumentError(f"duration interval must be greater than 0 and like '5s', and it is '{text[:32]}'")
    return seconds


def _reading(roots: Roots, container: records.Container) -> dict[str, Any]:
    read: dict[str, Any] = known.ask(roots, container, {"verb": "stats"}, stopped=_not_running(container))["stats"]
    return read


def _stats(roots: Roots, container: records.Container) -> dict[str, Any]:
    return {"type": "stats", "id": container.id, "data": shown(_reading(roots, container))}


def shown(read: dict[str, Any]) -> dict[str, Any]:
    """A reading of the guest's cgroup in the shape of runc's."""
    memory = read.get("memory_stat") or {}
    none = {"failcnt": 0}
    return {
        "cpu": {
            "usage": {
                "total": read["cpu_usage_us"] * 1000,
                "kernel": read["cpu_system_us"] * 1000,
                "user": read["cpu_user_us"] * 1000,
            },
            "throttling": {
                "periods": read["cpu_periods"],
                "throttledPeriods": read["cpu_throttled_periods"],
                "throttledTime": read["cpu_throttled_us"] * 1000,
            },
        },
        "cpuset": {},
        "memory": {
            "cache": memory.get("file", 0),
            "usage": {
                "limit": read["memory_limit_bytes"] or MOST,
                "usage": read["memory_bytes"],
                "max": read["memory_max_bytes"],
                "failcnt": read["oom_kills"],
            },
            "swap": {"limit": 0, **none},
            "kernel": {"limit": 0, **none},
            "kernelTCP": {"limit": 0, **none},
            "raw": memory,
        },
        "pids": {"current": read["pids"], **({"limit": read["pids_limit"]} if read["pids_limit"] else {})},
        "blkio": {
            "ioServiceBytesRecursive": [
                {"op": "Read", "value": read["io_read_bytes"]},
                {"op": "Write", "value": read["io_write_bytes"]},
            ]
        },
        "hugetlb": {},
        "intel_rdt": {},
        "network_interfaces": None,
    }
