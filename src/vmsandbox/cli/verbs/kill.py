"""`vmsandbox kill`: a signal to the init process of containers."""

from __future__ import annotations

from vmsandbox import records
from vmsandbox.arguments import Parser
from vmsandbox.cli import client, launch
from vmsandbox.cli.verbs._each import each
from vmsandbox.errors import InvalidStateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsandbox.cli.main import Options


def main(options: Options, argv: list[str]) -> int:
    made = Parser(prog="vmsandbox kill")
    made.add_argument("-s", "--signal", default="KILL", help="name or number (default KILL)")
    made.add_argument("containers", nargs="+", metavar="CONTAINER")
    arguments = made.parse_args(argv)
    roots = options.roots()

    def kill(name: str) -> None:
        client.insisting(lambda: attempt(name))

    def attempt(name: str) -> None:
        container = records.load(roots, records.resolve(roots, name))
        if container.status() == "stopped":
            raise InvalidStateError(f"container '{name}'", state="stopped", wanted="kill")
        with launch.connect_or_take_over(roots, container.sandbox) as sock:
            client.request(sock, {"verb": "kill", "container": container.id, "signal": arguments.signal})

    return each(arguments.containers, kill, debug=options.debug)
