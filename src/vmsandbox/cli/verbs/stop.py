"""`vmsandbox stop`: the stop signal, a time to obey, then SIGKILL."""

from __future__ import annotations

import argparse

from vmsandbox import records
from vmsandbox.arguments import Parser
from vmsandbox.cli import client, launch
from vmsandbox.cli.verbs._each import each

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsandbox.cli.main import Options
    from vmsandbox.paths import Roots

#: that `--time` takes; who wants more wants to wait for ever
MOST_SECONDS = 1_000_000


def main(options: Options, argv: list[str]) -> int:
    made = Parser(prog="vmsandbox stop")
    made.add_argument("-t", "--time", type=seconds, default=None, metavar="SECONDS", help="before SIGKILL; -1: never")
    made.add_argument("containers", nargs="+", metavar="CONTAINER")
    arguments = made.parse_args(argv)
    roots = options.roots()

    def act(name: str) -> None:
        stop(roots, name, arguments.time)

    return each(arguments.containers, act, debug=options.debug)


def seconds(text: str) -> float:
    """How long a container has to obey; -1 is for ever."""
    value = float(text)
    if value == -1 or 0 <= value <= MOST_SECONDS:
        return value
    raise argparse.ArgumentTypeError(f"'{text}' is out of range: give 0 to {MOST_SECONDS}, or -1 to wait for ever")


def stop(roots: Roots, name: str, timeout: float | None) -> None:
    """Stop one container; `timeout` seconds (None: the configured ones) before SIGKILL, a stopped one is fine."""

    def attempt() -> None:
        container = records.load(roots, records.resolve(roots, name))
        if container.document.get("status") == "stopped":
            return
        with launch.connect_or_take_over(roots, container.sandbox) as sock:
            client.request(sock, {"verb": "stop", "container": container.id, "timeout": timeout})
            client.wait_for_end(sock)

    client.insisting(attempt)
