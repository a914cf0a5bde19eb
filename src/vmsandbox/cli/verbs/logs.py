"""`vmsandbox logs`: what a container has printed."""

from __future__ import annotations

import argparse
import sys

from vmsandbox import records
from vmsandbox.cli import containerlog

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsandbox.cli.main import Options


def main(options: Options, argv: list[str]) -> int:
    made = argparse.ArgumentParser(prog="vmsandbox logs", allow_abbrev=False)
    made.add_argument("-t", "--timestamps", action="store_true", help="show when each line was printed")
    made.add_argument("-n", "--tail", type=int, default=None, metavar="N", help="only the last N lines")
    made.add_argument("container", metavar="CONTAINER")
    arguments = made.parse_args(argv)
    roots = options.roots()
    container = records.load(roots, records.resolve(roots, arguments.container))
    path = f"{roots.container_data_dir}/{container.id}/log"
    found = list(containerlog.records(path)) if arguments.tail is not None else containerlog.records(path)
    if arguments.tail is not None:
        assert isinstance(found, list)
        found = found[len(found) - min(len(found), max(0, arguments.tail)) :]
    streams = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}
    for record in found:
        if arguments.timestamps:
            streams[record.stream].write(record.stamp.encode() + b" ")
        streams[record.stream].write(record.data())
    for stream in streams.values():
        stream.flush()
    return 0
