"""`vmsandbox rm`: forget containers, with all they own."""

from __future__ import annotations

from vmsandbox import records
from vmsandbox.arguments import Parser
from vmsandbox.cli import client, launch
from vmsandbox.cli.removal import remove_from_disk
from vmsandbox.cli.verbs._each import each
from vmsandbox.errors import InvalidStateError, SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsandbox.cli.main import Options
    from vmsandbox.paths import Roots


def main(options: Options, argv: list[str]) -> int:
    made = Parser(prog="vmsandbox rm")
    made.add_argument("-f", "--force", action="store_true", help="running ones as well: they are killed")
    made.add_argument("containers", nargs="+", metavar="CONTAINER")
    arguments = made.parse_args(argv)
    roots = options.roots()

    def remove(name: str) -> None:
        client.insisting(lambda: attempt(name))

    def attempt(name: str) -> None:
        container = records.load(roots, records.resolve(roots, name))
        force = arguments.force or container.status() == "created"
        if container.status() != "stopped" and not force:
            raise InvalidStateError(
                f"container '{name}'",
                state=container.status(),
                wanted="remove",
                remedy="stop it first or use '--force'",
            )
        if not remove_by_supervisor(roots, container, force=force):
            remove_from_disk(roots, container)

    return each(arguments.containers, remove, debug=options.debug)


def remove_by_supervisor(roots: Roots, container: records.Container, *, force: bool) -> bool:
    """Have the pod's supervisor remove the container; False where none is left to do it."""
    running = container.document.get("status") != "stopped" or machine_lives(roots, container)
    try:
        sock = (launch.connect_or_take_over(roots, container.sandbox)) if running else launch.connect(container.sandbox)
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    with sock:
        client.request(sock, {"verb": "delete", "container": container.id, "force": force})
        client.wait_for_end(sock)
    return True


def machine_lives(roots: Roots, container: records.Container) -> bool:
    """Whether the container's pod goes on without it, and may still hold its disks."""
    try:
        pod_id = records.pod_id_of(container.sandbox)
        return bool(pod_id) and records.load_pod(roots, pod_id).status() != "stopped"
    except SandboxError:
        return False
