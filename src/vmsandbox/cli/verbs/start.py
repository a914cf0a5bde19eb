"""`vmsandbox start`: let created containers run."""

from __future__ import annotations

from vmsandbox.arguments import Parser
from vmsandbox.cli.verbs._each import each
from vmsandbox.cli.verbs._running import ask

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from vmsandbox.cli.main import Options


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="vmsandbox start", description="Starts containers that were created.")
    made.add_argument("containers", nargs="+", metavar="CONTAINER")
    return made


def main(options: Options, argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    roots = options.roots()

    def start(name: str) -> None:
        ask(roots, name, {"verb": "start"}, wanted="start")

    return each(arguments.containers, start, debug=options.debug)
