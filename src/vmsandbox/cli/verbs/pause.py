"""`vmsandbox pause`: freeze the processes of containers."""

from __future__ import annotations

from vmsandbox.arguments import Parser
from vmsandbox.cli.verbs._each import each
from vmsandbox.cli.verbs._running import ask

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from vmsandbox.cli.main import Options


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="vmsandbox pause", description="Freezes every process of the containers; 'unpause' lets them go on."
    )
    made.add_argument("containers", nargs="+", metavar="CONTAINER")
    return made


def main(options: Options, argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    roots = options.roots()

    def pause(name: str) -> None:
        ask(roots, name, {"verb": "pause"}, wanted="pause")

    return each(arguments.containers, pause, debug=options.debug)
