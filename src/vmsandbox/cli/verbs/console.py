"""`vmsandbox console`: what the guest's kernel and agent printed."""

from __future__ import annotations

import sys

from vmsandbox import records
from vmsandbox.arguments import Parser
from vmsandbox.cli import client, launch
from vmsandbox.errors import NotFoundError, UnavailableError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsandbox.cli.main import Options
    from vmsandbox.paths import Roots, SandboxPaths


def main(options: Options, argv: list[str]) -> int:
    made = Parser(prog="vmsandbox console")
    made.add_argument("name", metavar="CONTAINER|POD")
    name = made.parse_args(argv).name
    try:
        sock = launch.connect(machine_of(options.roots(), name))
    except OSError:
        raise UnavailableError(f"'{name}' has no virtual machine any more: its console is gone") from None
    with sock:
        answer = client.request(sock, {"verb": "console"})
    print(answer["console"], end="")
    if not answer["console"]:
        since = "is a clone and has printed nothing since it was restored" if answer["clone"] else "has printed nothing"
        print(f"vmsandbox: the virtual machine of '{name}' {since}", file=sys.stderr)
    return 0


def machine_of(roots: Roots, name: str) -> SandboxPaths:
    """Where the machine of a container, or of a pod, is looked after."""
    try:
        return records.load(roots, records.resolve(roots, name)).sandbox
    except NotFoundError as error:
        try:
            return records.load_pod(roots, records.resolve_pod(roots, name)).sandbox
        except NotFoundError:
            raise error from None
