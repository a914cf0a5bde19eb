"""`vmsandbox logs`: what a container has printed, and what it prints from now on."""

from __future__ import annotations

import os
import re
import sys
import time
from collections import deque

from vmsandbox import records
from vmsandbox.arguments import Parser
from vmsandbox.cli import containerlog
from vmsandbox.errors import InvalidArgumentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from vmsandbox.cli.main import Options

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="vmsandbox logs", allow_abbrev=False, description="Shows what a container has printed.")
    made.add_argument("-f", "--follow", action="store_true", help="go on with what it prints until it ends")
    made.add_argument("-t", "--timestamps", action="store_true", help="show when each line was printed")
    made.add_argument("-n", "--tail", type=lines, default=None, metavar="N", help="only the last N lines, or 'all'")
    made.add_argument(
        "--since", default=None, metavar="TIME", help="only newer lines: 10m ago, or 2030-01-31T12:00:00Z, or seconds"
    )
    made.add_argument("container", metavar="CONTAINER")
    return made


def lines(text: str) -> int | None:
    return None if text == "all" else max(0, int(text))


def main(options: Options, argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    since = stamp_of(arguments.since) if arguments.since else ""
    roots = options.roots()
    container = records.load(roots, records.resolve(roots, arguments.container))
    path = f"{roots.container_data_dir}/{container.id}/log"
    if arguments.follow:
        follow(container, path, arguments, since)
    else:
        show(last(newer(containerlog.records(path), since), arguments.tail), timestamps=arguments.timestamps)
    return 0


def newer(found: Iterable[containerlog.Record], since: str) -> Iterable[containerlog.Record]:
    return (record for record in found if record.stamp >= since)


def last(found: Iterable[containerlog.Record], count: int | None) -> Iterable[containerlog.Record]:
    return found if count is None else deque(found, maxlen=count)


def show(found: Iterable[containerlog.Record], *, timestamps: bool) -> None:
    streams = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}
    for record in found:
        if timestamps:
            streams[record.stream].write(record.stamp.encode() + b" ")
        streams[record.stream].write(record.data())
    for stream in streams.values():
        stream.flush()


def follow(container: records.Container, path: str, arguments: argparse.Namespace, since: str) -> None:
    """Show what there is, then whatever comes, until the container's stand-in has written its last."""
    from vmsandbox.cli.verbs._follow import Tail, Watch

    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        return
    standin = container.document.get("standin") or {}
    watch = Watch(directory, standin.get("pid"), standin.get("start_time"))
    tail = Tail(path, opened=watch.file)
    try:
        show(last(newer(tail.records(), since), arguments.tail), timestamps=arguments.timestamps)
        going_on = True
        while going_on:
            going_on = watch.wait()
            show(newer(tail.records(), since), timestamps=arguments.timestamps)
    finally:
        tail.close()
        watch.close()


def stamp_of(text: str) -> str:
    """The time a log would write for `text`: a duration before now, seconds since the epoch, or a date in UTC."""
    moment = None
    if re.fullmatch(r"(\d{1,9}[smhd])+", text):
        parts = re.findall(r"(\d+)([smhd])", text)
        moment = time.time() - sum(int(count) * UNITS[unit] for count, unit in parts)
    elif re.fullmatch(r"\d{1,11}(\.\d{1,9})?", text):
        moment = float(text)
    else:
        from datetime import UTC, datetime

        try:
            parsed = datetime.fromisoformat(text)
        except ValueError:
            raise InvalidArgumentError(
                f"invalid time '{text}': write for example '10m', '1h30m', '2030-01-31T12:00:00Z' or seconds"
            ) from None
        moment = (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    seconds, nanos = divmod(int(max(0.0, moment) * 1e9), 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanos:09d}Z"
