"""`vmsandbox unpause`: let paused containers go on."""

from __future__ import annotations

from vmsandbox.arguments import Parser
from vmsandbox.cli.verbs._each import each
from vmsandbox.cli.verbs._running import ask

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from vmsandbox.cli.main import Options


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="vmsandbox unpause", description="Lets paused containers go on.")
    made.add_argument("containers", nargs="+", metavar="CONTAINER")
    return made


def main(options: Options, argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    roots = options.roots()

    def unpause(name: str) -> None:
        ask(roots, name, {"verb": "resume"}, wanted="unpause")

    return each(arguments.containers, unpause, debug=options.debug)
