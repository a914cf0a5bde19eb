"""`vmsandbox restart`: stop containers in order, and start them again."""

from __future__ import annotations

from vmsandbox.arguments import Parser
from vmsandbox.cli.verbs._each import each
from vmsandbox.cli.verbs.start import start
from vmsandbox.cli.verbs.stop import seconds, stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsandbox.cli.main import Options


def main(options: Options, argv: list[str]) -> int:
    made = Parser(
        prog="vmsandbox restart",
        description="Stops containers and starts them again, on the same writable layer; a stopped one is started.",
    )
    made.add_argument("-t", "--time", type=seconds, default=None, metavar="SECONDS", help="before SIGKILL; -1: never")
    made.add_argument("containers", nargs="+", metavar="CONTAINER")
    arguments = made.parse_args(argv)
    roots = options.roots()

    def restart(name: str) -> None:
        stop(roots, name, arguments.time)
        start(options, roots, name)

    return each(arguments.containers, restart, debug=options.debug)
