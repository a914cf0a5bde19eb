"""`vmsandbox stop`: the stop signal, a time to obey, then SIGKILL."""

from __future__ import annotations

from vmsandbox import records
from vmsandbox.arguments import Parser
from vmsandbox.cli import client, launch
from vmsandbox.cli.verbs._each import each

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsandbox.cli.main import Options
    from vmsandbox.paths import Roots


def main(options: Options, argv: list[str]) -> int:
    made = Parser(prog="vmsandbox stop")
    made.add_argument("-t", "--time", type=float, default=None, metavar="SECONDS", help="before SIGKILL")
    made.add_argument("containers", nargs="+", metavar="CONTAINER")
    arguments = made.parse_args(argv)
    roots = options.roots()

    def act(name: str) -> None:
        stop(roots, name, arguments.time)

    return each(arguments.containers, act, debug=options.debug)


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
