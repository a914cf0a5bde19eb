"""`vmsandbox console`: what the guest's kernel and agent printed."""

from __future__ import annotations

from vmsandbox import records
from vmsandbox.arguments import Parser
from vmsandbox.cli import client, launch
from vmsandbox.errors import UnavailableError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsandbox.cli.main import Options


def main(options: Options, argv: list[str]) -> int:
    made = Parser(prog="vmsandbox console")
    made.add_argument("container", metavar="CONTAINER")
    arguments = made.parse_args(argv)
    roots = options.roots()
    container = records.load(roots, records.resolve(roots, arguments.container))
    try:
        sock = launch.connect(container.sandbox)
    except OSError:
        raise UnavailableError(
            f"container '{arguments.container}' has no virtual machine any more: its console is gone"
        ) from None
    with sock:
        print(client.request(sock, {"verb": "console"})["console"], end="")
    return 0
