"""`vmsandbox wait`: until containers have ended; prints their exit codes."""

from __future__ import annotations

from vmsandbox import records
from vmsandbox.arguments import Parser
from vmsandbox.cli import client, launch
from vmsandbox.cli.verbs._each import each

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsandbox.cli.main import Options


def main(options: Options, argv: list[str]) -> int:
    made = Parser(prog="vmsandbox wait")
    made.add_argument("containers", nargs="+", metavar="CONTAINER")
    arguments = made.parse_args(argv)
    roots = options.roots()

    def wait(name: str) -> str:
        return client.insisting(lambda: attempt(name))

    def attempt(name: str) -> str:
        container = records.load(roots, records.resolve(roots, name))
        status = container.document.get("exit")
        if status is None:
            with launch.connect_or_take_over(roots, container.sandbox) as sock:
                status = client.request(sock, {"verb": "wait", "container": container.id})["exit"]
        return str(status["code"])

    return each(arguments.containers, wait, debug=options.debug)
