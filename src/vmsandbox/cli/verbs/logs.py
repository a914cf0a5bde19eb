"""`vmsandbox logs`: what a container has printed, and what it prints from now on.

A line may be several records, one for each piece that the container wrote; stdout's and stderr's may alternate.
"""

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

UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86400}
#: a number and its unit, as Go writes durations, and days
DURATION = r"(\d{1,9}(?:\.\d{1,9})?)(ns|us|ms|[smhd])"


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="vmsandbox logs", allow_abbrev=False, description="Shows what a container has printed.")
    made.add_argument("-f", "--follow", action="store_true", help="go on with what it prints until it ends")
    made.add_argument("-t", "--timestamps", action="store_true", help="show when each line was printed")
    made.add_argument("-n", "--tail", type=lines, default=None, metavar="N", help="only the last N lines, or 'all'")
    made.add_argument(
        "--since",
        default=None,
        metavar="TIME",
        help="only what is newer: 10m (ago), 2030-01-31T12:00:00Z (local time without a zone), or seconds since 1970",
    )
    made.add_argument("container", metavar="CONTAINER")
    return made


def lines(text: str) -> int | None:
    """How many lines are wanted; None for all, which is also what docker takes negative numbers for."""
    import argparse

    if not re.fullmatch(r"all|-?\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number of lines nor 'all'")
    return None if text == "all" or text.startswith("-") else int(text)


def main(options: Options, argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    since = stamp_of(arguments.since) if arguments.since else ""
    roots = options.roots()
    container = records.load(roots, records.resolve(roots, arguments.container))
    path = f"{roots.container_data_dir}/{container.id}/log"
    if arguments.follow:
        follow(container, path, arguments, since)
    else:
        Printer(timestamps=arguments.timestamps).show(last(newer(containerlog.records(path), since), arguments.tail))
    return 0


def newer(found: Iterable[containerlog.Record], since: str) -> Iterable[containerlog.Record]:
    return (record for record in found if record.stamp >= since)


def last(found: Iterable[containerlog.Record], count: int | None) -> Iterable[containerlog.Record]:
    """The records of the last `count` lines that were begun."""
    if count is None:
        return found
    kept: deque[tuple[int, containerlog.Record]] = deque()
    #: the line that a stream is in the middle of, by its number
    begun: dict[str, int] = {}
    total = 0
    for record in found:
        number = begun.pop(record.stream, 0)
        if not number:
            number = total = total + 1
        if record.partial:
            begun[record.stream] = number
        kept.append((number, record))
        while kept and kept[0][0] <= total - count:
            kept.popleft()
    return [record for number, record in kept if number > total - count]


class Printer:
    """Writes records to the streams that they came from, in their order even if both go to one place."""

    def __init__(self, *, timestamps: bool) -> None:
        self.timestamps = timestamps
        self._within: set[str] = set()

    def show(self, found: Iterable[containerlog.Record]) -> None:
        streams = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}
        before = ""
        for record in found:
            if before not in ("", record.stream):
                streams[before].flush()
            before = record.stream
            if self.timestamps and record.stream not in self._within:
                streams[before].write(record.stamp.encode() + b" ")
            streams[before].write(record.data())
            (self._within.add if record.partial else self._within.discard)(record.stream)
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
    printer = Printer(timestamps=arguments.timestamps)
    try:
        printer.show(last(newer(tail.records(), since), arguments.tail))
        going_on = True
        while going_on:
            going_on = watch.wait()
            printer.show(newer(tail.records(), since))
    finally:
        tail.close()
        watch.close()


def stamp_of(text: str) -> str:
    """The time a log would write for `text`: a duration before now, seconds since the epoch, or a date.

    A date without a zone is local time, as docker takes it.
    """
    moment = None
    if re.fullmatch(f"(?:{DURATION})+", text):
        moment = time.time() - sum(float(count) * UNITS[unit] for count, unit in re.findall(DURATION, text))
    elif re.fullmatch(r"\d{1,11}(\.\d{1,9})?", text):
        moment = float(text)
    else:
        from datetime import datetime

        try:
            moment = datetime.fromisoformat(text).timestamp()
        except (ValueError, OverflowError):
            raise InvalidArgumentError(
                f"invalid time '{text}': write for example '10m', '1h30m', '2030-01-31T12:00:00Z' or seconds"
            ) from None
    seconds, nanos = divmod(int(max(0.0, moment) * 1e9), 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanos:09d}Z"
