"""`vmsandbox start`: let created containers run, and stopped ones run again on the same writable layer."""

from __future__ import annotations

from vmsandbox import records
from vmsandbox.arguments import Parser
from vmsandbox.cli import client, launch, standin
from vmsandbox.cli.verbs._each import each
from vmsandbox.cli.verbs._running import ask_about
from vmsandbox.errors import InvalidStateError, NotFoundError, SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from vmsandbox.cli.main import Options
    from vmsandbox.paths import Roots


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="vmsandbox start",
        description="Starts containers that were created, or stopped ones again; their output goes to their logs.",
    )
    made.add_argument("containers", nargs="+", metavar="CONTAINER")
    return made


def main(options: Options, argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    roots = options.roots()

    def act(name: str) -> None:
        start(options, roots, name)

    return each(arguments.containers, act, debug=options.debug)


def start(options: Options, roots: Roots, name: str) -> None:
    """Start one container; `InvalidStateError` if it runs."""

    def attempt() -> None:
        container = records.load(roots, records.resolve(roots, name))
        status = container.status()
        if status == "stopped":
            start_again(options, roots, container)
        elif status == "created":
            ask_about(roots, container, {"verb": "start"}, name=name, wanted="start")
        else:
            raise InvalidStateError(f"container '{name}'", state=status, wanted="start")

    client.insisting(attempt)


def start_again(options: Options, roots: Roots, container: records.Container) -> None:
    """Give a stopped container a new stand-in, and a new machine if its pod has none."""
    plan = standin.Plan(container.id, stdin=False, stdout=False, terminal=False)
    try:
        connection = launch.connect_or_take_over(
            roots, container.sandbox, revive=True, arguments=options.supervisor_arguments()
        )
    except FileNotFoundError:
        raise NotFoundError(f"cannot start container '{container.name or container.id}': its pod is gone") from None
    with connection as sock:
        pid = standin.of_client(roots, container.sandbox, plan, detach=True)
        identity = {"pid": pid, "start_time": records.start_time(pid)}
        try:
            client.request(sock, {"verb": "start", "container": container.id, "standin": identity})
        except SandboxError:
            standin.end(pid)
            client.wait_for_end(sock)
            raise
